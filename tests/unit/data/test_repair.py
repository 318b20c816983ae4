import pytest

from finetune.data.cleaning.repair import repair_record
from finetune.data.record import Message, make_record
from finetune.data_sections import Clean


def rules(**changes):
    values = {
        "normalization": "NFC",
        "repair_mojibake": True,
        "unescape_html": True,
        "min_answer_characters": 2,
        "min_record_characters": 1,
        "max_record_characters": 100,
        "max_repeated_characters": 20,
        "languages": None,
        "drop_retweets": True,
        "drop_link_only": True,
        "drop_personal_data": [],
        "automatic_reply_patterns": [],
        "near_duplicates": None,
        "decontamination": None,
        "max_quarantined_share": 0.05,
    }
    return Clean(**{**values, **changes})


def test_repairs_are_counted_by_text_and_the_record_gets_the_id_of_its_new_content():
    damaged = make_record(
        source="s",
        messages=(Message("user", "Tom &amp; L&eacute;a"), Message("assistant", "dÃ©jÃ\u00a0 vu &amp;\ne\u0301")),
    )
    clean = make_record(source="s", messages=(Message("user", "Tom & Léa"), Message("assistant", "déjà vu &\né")))
    repaired = repair_record(damaged, rules())
    assert repaired.record == clean
    assert repaired.record.group == clean.group
    assert dict(+repaired.texts_by_repair) == {"mojibake": 1, "html_entities": 2, "normalization": 1}


def test_what_is_left_of_mojibake_is_counted_as_uncertain():
    record = make_record(source="s", text="Le mot « Ã© » est du mojibake.")
    repaired = repair_record(record, rules())
    assert repaired.record is record
    assert dict(+repaired.texts_by_repair) == {"mojibake_uncertain": 1}


def test_mojibake_behind_entities_is_repaired_too():
    record = make_record(source="s", text="l&acirc;&euro;&trade;&Atilde;&copy;t&Atilde;&copy;")
    repaired = repair_record(record, rules())
    assert repaired.record.text == "l’été"
    assert dict(+repaired.texts_by_repair) == {"mojibake": 1, "html_entities": 1}


def test_only_whole_known_entities_are_unescaped():
    record = make_record(source="s", text="&lt;b&#233;&#xE9;&gt; &unknown; x?a=1&section=2&copy=3 &notit; &amp;lt;")
    assert repair_record(record, rules()).record.text == "<béé> &unknown; x?a=1&section=2&copy=3 &notit; &lt;"


@pytest.mark.parametrize(("form", "text"), [("NFC", "ﬁn ½ é"), ("NFKC", "fin 1⁄2 é")])
def test_text_gets_the_normal_form_that_is_asked_for(form, text):
    assert repair_record(make_record(source="s", text="ﬁn ½ e\u0301"), rules(normalization=form)).record.text == text


def test_tool_calls_and_definitions_are_left_alone():
    call = '[{"arguments": {"text": "dÃ©jÃ\u00a0 &amp;"}, "name": "f"}]'
    record = make_record(
        source="s", messages=(Message("user", "q"), Message("assistant", "", call)), tools='[{"name": "&amp;"}]'
    )
    assert repair_record(record, rules()).record is record


def test_what_is_switched_off_is_not_done():
    record = make_record(source="s", text="dÃ©jÃ\u00a0 &amp;", group="g")
    repaired = repair_record(record, rules(repair_mojibake=False, unescape_html=False))
    assert repaired.record is record
    assert not +repaired.texts_by_repair


def test_entities_in_code_are_what_the_author_shows():
    text = "Écrivez `&lt;` &amp; non &lt; :\n```html\n<p>&amp;</p>\n```\nfin &eacute;"
    repaired = repair_record(make_record(source="s", text=text), rules())
    assert repaired.record.text == "Écrivez `&lt;` & non < :\n```html\n<p>&amp;</p>\n```\nfin é"
    assert dict(+repaired.texts_by_repair) == {"html_entities": 1}
