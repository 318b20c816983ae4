"""repair(mojibake(x)) == x and repair(clean) == clean, on French and English text."""

import codecs

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.cleaning.mojibake import repair_mojibake

SENTENCES = [
    "L’été dernier, nous avons déjà goûté à la crème brûlée du café d’à côté.",
    "« Où est passé l’œuf ? », demanda Zoë, très étonnée.",
    "Ça coûte 12,50 € l’unité — c’est peu… n’est-ce pas ?",
    "À Noël, l’âne naïf mange du maïs près de l’île.",
    "ÇA, C’EST L’ŒUVRE D’UN MAÎTRE ÉBÉNISTE : ÊTRE PRÊT À TOUT !",
    "Il fait 21 °C ; le n° 4 a gagné 1½ point, soit ± 3 %.",
    "J’ai hâte 🎉 de vous revoir 🧑‍🔧, bientôt ✅ !",
    "« JUSTIFIÉ » se dit « prouvé ».",
    "Sous l’égide d’Anaïs, Gaëlle et Loïc : forêt, hêtre, août, dû.",
    "Le “petit” mot d’hier – ou d’aujourd’hui – reste là.",
    "It’s a “smart” idea — really… isn’t it?",
    "The café’s résumé cost £20 (≈ €23) at 70 °F.",
    "Don’t worry 😀: naïve coöperation pays 100 %.",
    "Plain ASCII text, with nothing to repair.",
    "x ≥ 2 → √x ≤ x², and π ≈ 3.14 × 1.",
    "© 2024 Atelier™ — tous droits réservés ®",
]
# Sound text where a capital or an accent stands before a no-break space, a quote or dots.
HARD = [
    "Prêté\u00a0», dit-il à Zoé\u00a0: «\u00a0vu\u00a0».",
    "CAFÉ… À\u00a0LA CARTE\u00a0!",
    "5 Å\u00a0; HÔTEL\u00a0; PRÊT…",
]
NOT_BROKEN = st.sampled_from(SENTENCES + HARD)
TEXTS = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6)
CODECS = st.sampled_from(["cp1252", "latin-1", "cp1254"])


def mangled(text: str, codec: str) -> str:
    """UTF-8 read in a one-byte encoding; an undefined byte becomes the control of its number, as readers do."""
    table = "".join(bytes([byte]).decode(codec, "ignore") or chr(byte) for byte in range(256))
    return codecs.charmap_decode(text.encode(), "strict", table)[0]


@given(st.lists(NOT_BROKEN, max_size=8), st.sampled_from([" ", "\n", "\r\n", "\n\n- "]))
def test_sound_text_stays_as_it_is(sentences, separator):
    text = separator.join(sentences)
    assert repair_mojibake(text) == (text, False)


@given(TEXTS, st.sampled_from([" ", "\n", "\t"]), CODECS)
def test_text_mangled_once_comes_back(sentences, separator, codec):
    text = separator.join(sentences)
    assert repair_mojibake(mangled(text, codec)) == (text, False)


@given(TEXTS, CODECS, CODECS)
def test_text_mangled_twice_comes_back(sentences, first, second):
    text = "\n".join(sentences)
    assert repair_mojibake(mangled(mangled(text, first), second)) == (text, False)


@given(st.lists(st.tuples(st.sampled_from(SENTENCES), st.integers(0, 2), CODECS), min_size=1, max_size=8))
def test_text_of_which_some_lines_are_mangled_comes_back(lines):
    damaged = []
    for sentence, times, codec in lines:
        for _ in range(times):
            sentence = mangled(sentence, codec)
        damaged.append(sentence)
    assert repair_mojibake("\n".join(damaged)) == ("\n".join(sentence for sentence, _, _ in lines), False)


@given(st.lists(NOT_BROKEN, max_size=8), CODECS)
def test_what_was_repaired_needs_no_second_repair(sentences, codec):
    repaired, _ = repair_mojibake(mangled("\n".join(sentences), codec))
    assert repair_mojibake(repaired)[0] == repaired


@given(st.text(max_size=60) | st.text(alphabet=st.characters(max_codepoint=0x24F), max_size=60))
@settings(max_examples=300)
def test_any_text_goes_through_and_keeps_its_lines(text):
    assert repair_mojibake(text)[0].count("\n") == text.count("\n")
