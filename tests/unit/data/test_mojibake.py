import pytest

from finetune.data.cleaning.mojibake import repair_mojibake


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        ("Le modÃ¨le dâ€™Ã©tÃ©\nété déjà", "Le modèle d’été\nété déjà"),
        # The second byte of à is a no-break space in cp1252; those of Á and Í have no character, and are controls.
        ("dÃ©jÃ\u00a0 vu", "déjà vu"),
        ("Ã\u0081rbol, Ã\u008dndice", "Árbol, Índice"),
        ("50 â‚¬ â€œ Å“uvre Å’uvre â€¦", "50 € “ œuvre Œuvre …"),
        ("lâ\u0080\u0099Ã©tÃ© en latin-1", "l’été en latin-1"),
        ("ğŸ§\xa0 cp1254", "🧠 cp1254"),
        ("ðŸ§\xa0 cp1252 âœ… â‰¥ 24 Â°C", "🧠 cp1252 ✅ ≥ 24 °C"),
        ("l‚Äô√©t√© en mac_roman", "l’été en mac_roman"),
        ("d├⌐j├á en cp437", "déjà en cp437"),
    ],
)
def test_utf8_read_in_another_encoding_is_undone(damaged, repaired):
    assert repair_mojibake(damaged) == (repaired, False)


def test_damage_upon_damage_is_undone():
    assert repair_mojibake("dÃƒÂ©jÃƒÂ\u00a0 vu, lÃ¢â‚¬â„¢ÃƒÂ©tÃƒÂ©") == ("déjà vu, l’été", False)
    # Latin-1 first, then cp1252: the controls of the first are characters of the second.
    assert repair_mojibake("lÃ¢Â€Â™ÃƒÂ©tÃƒÂ©") == ("l’été", False)


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        # The no-break space of à became a space; white space may have been collapsed.
        ("dÃ©jÃ  vu", "déjà vu"),
        ("dÃ©jÃ vu", "déjà vu"),
        ("voilÃ , câ€™est fait", "voilà, c’est fait"),
        # cp1252 has no character for the last byte of a closing quote and of an emoji's selector.
        ("lâ€™â€œÃ©veilâ€.", "l’“éveil”."),
        ("âš™ï¸ RÃ©glages", "⚙️ Réglages"),
    ],
)
def test_what_was_lost_on_the_way_is_put_back_where_the_line_leaves_one_reading(damaged, repaired):
    assert repair_mojibake(damaged) == (repaired, False)


@pytest.mark.parametrize(
    ("damaged", "left"),
    [
        # Two of four bytes of an emoji are lost: dozens may have stood there. The rest of the line is certain.
        ("ğŸ Versions recommandÃ©es", "ğŸ Versions recommandées"),
        # No quote was opened, so it may be a dash, a space or a quote.
        ("Ã©tÃ©â€ fini", "étéâ€ fini"),
        ("Le mot « Ã© » est du mojibake.", "Le mot « Ã© » est du mojibake."),
        ("mon modÃ¨le d’été", "mon modÃ¨le d’été"),
        ("50 Â€", "50 Â€"),
    ],
)
def test_what_is_not_certain_stays_and_is_told(damaged, left):
    assert repair_mojibake(damaged) == (left, True)


@pytest.mark.parametrize(
    "text",
    [
        "été",
        "AÃO",
        "NÃO…",
        "naïve café — « déjà »",
        "🧠 日本語",
        "Ã",
        "Ã la carte",
        "a\u00a0b",
        "50 €",
        "café\u00a0»",
        "JUSTIFIÉ\u00a0»",
        "PÂTÉ À L’ÂGE…",
        "dit—école",
        "10 h –à voir",
        "5 Å\u00a0; 3 Å…",
        "AQUÍ…",
        "├── src\n└── été",
        "√2 ≈ 1,41",
        "‚Ärger‘",
        "TÔT, HÔTEL, GOÛT",
        "naï\u00a0» ",
        "\ud800Ã©\ud800",
        "Łódź, Malmö, Øre, Straße",
    ],
)
def test_sound_text_is_left_alone(text):
    assert repair_mojibake(text)[0] == text
