"""The detector's answers on a dozen sentences a language, and what follows for a record."""

import pytest

from finetune.data.cleaning.language import identify, sample, settle_language
from finetune.data.record import Message, make_record
from finetune.data_sections import Languages

SENTENCES = {
    "fr": [
        "Le rabot est un outil qui sert à aplanir le bois.",
        "Combien de temps faut-il pour cuire un œuf dur ?",
        "Je vous remercie de votre réponse rapide et précise.",
        "La réunion de demain est reportée à la semaine prochaine.",
        "Pourquoi le ciel est-il bleu pendant la journée ?",
        "Il faut d'abord poncer la planche avec un grain fin.",
        "Ma voisine a planté des tomates dans son jardin.",
        "Explique-moi la différence entre être et paraître.",
        "Nous avons marché longtemps sur la plage déserte.",
        "Peux-tu résumer ce texte en trois phrases courtes ?",
        "Les enfants jouent dehors malgré la pluie et le vent.",
        "Cette recette demande deux cents grammes de farine.",
    ],
    "en": [
        "A plane is a tool that is used to flatten wood.",
        "How long does it take to cook a hard-boiled egg?",
        "Thank you very much for your quick and clear answer.",
        "The meeting of tomorrow has been moved to next week.",
        "Why is the sky blue during the day?",
        "You should first sand the board with a fine grit.",
        "My neighbour has planted tomatoes in her garden.",
        "Explain the difference between being and seeming.",
        "We walked for a long time on the empty beach.",
        "Can you sum up this text in three short sentences?",
        "The children play outside despite the rain and wind.",
        "This recipe calls for two hundred grams of flour.",
    ],
}
OTHERS = {
    "es": [
        "El cepillo es una herramienta que sirve para alisar la madera.",
        "¿Cuánto tiempo se tarda en cocer un huevo duro?",
        "Mi vecina ha plantado tomates en su jardín este año.",
    ],
    "de": [
        "Der Hobel ist ein Werkzeug, mit dem man Holz glättet.",
        "Wie lange dauert es, ein hartes Ei zu kochen?",
        "Meine Nachbarin hat Tomaten in ihrem Garten gepflanzt.",
    ],
    "it": [
        "La pialla è un attrezzo che serve a spianare il legno.",
        "Quanto tempo ci vuole per cuocere un uovo sodo?",
        "La mia vicina ha piantato i pomodori nel suo giardino.",
    ],
    "pt": [
        "A plaina é uma ferramenta que serve para alisar a madeira.",
        "Quanto tempo demora a cozer um ovo na panela da cozinha?",
        "A minha vizinha plantou tomates no seu jardim este ano.",
    ],
    "nl": [
        "De schaaf is een gereedschap om hout vlak te maken.",
        "Hoe lang duurt het om een ei hard te koken?",
        "Mijn buurvrouw heeft tomaten in haar tuin geplant.",
    ],
    "ca": [
        "El ribot és una eina que serveix per allisar la fusta de pi.",
        "La meva veïna ha plantat tomàquets al jardí.",
    ],
    "pl": ["Strug to narzędzie, które służy do wyrównywania drewna.", "Moja sąsiadka posadziła pomidory w ogrodzie."],
    "da": ["Høvlen er et værktøj, der bruges til at glatte træ.", "Min nabo har plantet tomater i sin have i år."],
    "ro": ["Rindeaua este o unealtă care servește la netezirea lemnului.", "Vecina mea a plantat roșii în grădină."],
    "ru": ["Рубанок — это инструмент для выравнивания дерева."],
}
RULES = Languages(allowed=["fr", "en"], min_characters=30, min_confidence=0.9)


def text(content, language=None):
    return make_record(source="s", text=content, language=language)


@pytest.mark.parametrize("language", ["fr", "en"])
def test_every_sentence_of_an_allowed_language_is_told_and_surely(language):
    answers = [identify(sentence, RULES.allowed) for sentence in SENTENCES[language]]
    assert [name for name, _ in answers] == [language] * 12
    assert min(confidence for _, confidence in answers) >= 0.9
    assert {settle_language(text(sentence), RULES)[0].language for sentence in SENTENCES[language]} == {language}


@pytest.mark.parametrize("language", sorted(OTHERS))
def test_every_sentence_of_another_language_is_wrong(language):
    for sentence in OTHERS[language]:
        assert settle_language(text(sentence), RULES) == (text(sentence), True)


def test_the_scores_are_these():
    # They are the same on every x86-64 processor; another model would show here.
    answers = [
        identify(sentence, RULES.allowed) for sentence in (SENTENCES["fr"][0], SENTENCES["en"][0], OTHERS["es"][0])
    ]
    assert [(name, round(confidence, 3)) for name, confidence in answers] == [
        ("fr", 0.973),
        ("en", 0.999),
        ("es", 0.996),
    ]


def test_capitals_do_not_change_the_language():
    assert identify(SENTENCES["fr"][0].upper(), RULES.allowed)[0] == "fr"


def test_text_that_has_no_utf8_is_told_too():
    assert identify("\ud800 " + SENTENCES["fr"][0], RULES.allowed)[0] == "fr"


def test_what_a_source_states_is_believed_unless_the_text_is_surely_another_language():
    french, spanish = SENTENCES["fr"][0], OTHERS["es"][0]
    assert settle_language(text(french, "en"), RULES) == (text(french, "en"), False)
    assert settle_language(text(spanish, "fr"), RULES) == (text(spanish, "fr"), True)
    assert settle_language(text(french, "es"), RULES) == (text(french, "es"), True)
    assert settle_language(text(french, "fr-CA"), RULES) == (text(french, "fr-CA"), False)


def test_short_or_unsure_text_is_kept_without_a_language():
    for content in (
        "Hola",
        "ok ok ok",
        "1 234 567 890 123 456 789 012 345 678",
        "El rabot is une cosa that sert para el wood et",
    ):
        assert settle_language(text(content), RULES) == (text(content), False)


def test_only_the_languages_of_the_recipe_are_allowed():
    french = Languages(allowed=["fr"], min_characters=30, min_confidence=0.9)
    assert settle_language(text(SENTENCES["en"][0]), french)[1]
    assert settle_language(text(SENTENCES["fr"][0]), french)[0].language == "fr"


def test_the_sample_is_what_people_say_without_code_and_links():
    record = make_record(
        source="s",
        messages=(
            Message("system", "You are a helpful assistant."),
            Message("user", "Corrige ceci : ```python\nprint('hello world')\n``` merci"),
            Message("assistant", "", '[{"arguments": {}, "name": "run"}]'),
            Message("tool", "traceback most recent call last"),
            Message("assistant", "Voir https://example.com/a/very/long/path et `x = 1` " + "mot " * 200),
        ),
        tools="[]",
    )
    taken = sample(record)
    assert taken.startswith("Corrige ceci :   merci Voir   et   mot mot")
    assert len(taken) <= 201
    assert sample(text("a" * 1000)) == "a" * 200
