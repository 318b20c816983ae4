from finetune.data.record import Message, make_record
from finetune.data.repair import repair_mojibake, repair_record
from finetune.data_sections import Clean


def rules(**changes):
    values = {
        "normalization": "NFC",
        "repair_mojibake": True,
        "unescape_html": True,
        "min_answer_characters": 2,
        "max_record_characters": 100,
        "drop_retweets": True,
        "drop_link_only": True,
        "automatic_reply_patterns": [],
        "max_quarantined_share": 0.05,
    }
    return Clean(**{**values, **changes})


def test_utf8_read_as_cp1252_is_undone_line_by_line():
    assert repair_mojibake("Le modÃ¨le dâ€™Ã©té\nété déjà\nlâ€™Ã‰veil") == (
        "Le modÃ¨le dâ€™Ã©té\nété déjà\nl’Éveil",
        True,
    )
    assert repair_mojibake("Le modÃ¨le dâ€™Ã©tÃ©\nété déjà") == ("Le modèle d’été\nété déjà", False)


def test_sound_text_is_left_alone():
    for text in ("été", "AÃO", "naïve café — « déjà »", "🧠 日本語", "Ã", "a\u00a0b", "50 €"):
        assert repair_mojibake(text) == (text, False)


def test_repairs_are_counted_by_text_and_the_record_gets_the_id_of_its_new_content():
    damaged = make_record(
        source="s", messages=(Message("user", "Tom &amp; L&eacute;a"), Message("assistant", "dÃ©jà vu &amp;\ne\u0301"))
    )
    clean = make_record(source="s", messages=(Message("user", "Tom & Léa"), Message("assistant", "déjà vu &\né")))
    mended = make_record(
        source="s",
        messages=(Message("user", "Tom &amp; L&eacute;a"), Message("assistant", "dÃ©jÃ\u00a0 vu &amp;\ne\u0301")),
    )
    assert repair_record(damaged, rules()).texts_by_repair["mojibake_uncertain"] == 1
    repaired = repair_record(mended, rules())
    assert repaired.record == clean
    assert repaired.record.group == clean.group
    assert dict(+repaired.texts_by_repair) == {"mojibake": 1, "html_entities": 2, "normalization": 1}


def test_only_whole_known_entities_are_unescaped():
    record = make_record(source="s", text="&lt;b&#233;&#xE9;&gt; &unknown; x?a=1&section=2&copy=3 &notit; &amp;lt;")
    assert repair_record(record, rules()).record.text == "<béé> &unknown; x?a=1&section=2&copy=3 &notit; &lt;"


def test_what_is_switched_off_is_not_done():
    record = make_record(source="s", text="dÃ©jÃ\u00a0 &amp;", group="g")
    repaired = repair_record(record, rules(repair_mojibake=False, unescape_html=False))
    assert repaired.record is record
    assert not +repaired.texts_by_repair
