from test_repair import rules

from finetune.data.cleaning.examine import examine
from finetune.data.record import Message, make_record

LANGUAGES = {"allowed": ["fr", "en"], "min_characters": 20, "min_confidence": 0.9}
RULES = rules(languages=LANGUAGES, drop_personal_data=["email", "phone"], max_record_characters=1000)


def answer(text, language=None):
    return make_record(
        source="s", messages=(Message("user", "Bonjour !"), Message("assistant", text)), language=language
    )


def test_a_record_is_repaired_first_then_judged_and_gets_its_language():
    examined = examine(answer("Le modÃ¨le de l&#39;atelier est dÃ©jÃ\u00a0 prÃªt pour demain."), RULES)
    assert examined.record == answer("Le modèle de l'atelier est déjà prêt pour demain.", "fr")
    assert examined.reason is None
    assert dict(+examined.texts_by_repair) == {"mojibake": 1, "html_entities": 1}


def test_a_sound_record_stays_the_same_object_where_its_source_gave_the_language():
    record = answer("The board must be sanded before you paint it.", "en")
    examined = examine(record, RULES)
    assert examined.record is record
    assert (examined.reason, dict(+examined.texts_by_repair)) == (None, {})


def test_one_record_has_one_reason_the_first():
    spanish = "El cepillo es una herramienta que sirve para alisar la madera"
    reasons = [
        (spanish + ", escriba a ana@madera.es", "wrong_language"),
        ("Écrivez à ana@bois.fr pour réserver votre place au cours.", "personal_data_email"),
        ("Appelez Ana au 06 12 34 56 78 pour réserver votre place.", "personal_data_phone"),
        ("RT @ana: " + spanish, "retweet"),
        ("Voici la réponse que vous attendiez : " + "ha" * 30, "repeated_characters"),
        ("Voici la réponse que vous attendiez depuis hier.", None),
    ]
    assert [examine(answer(text), RULES).reason for text, _ in reasons] == [reason for _, reason in reasons]


def test_personal_data_is_looked_for_in_every_text_of_the_record():
    call = '[{"arguments": {"to": "ana@bois.fr"}, "name": "send"}]'
    record = make_record(
        source="s", messages=(Message("user", "q"), Message("assistant", "", call), Message("tool", "envoyé"))
    )
    assert examine(record, RULES).reason == "personal_data_email"


def test_rules_that_are_off_look_for_nothing():
    record = answer("Escriba a ana@madera.es para saber más sobre la madera y sus herramientas.")
    examined = examine(record, rules())
    assert (examined.record, examined.reason) == (record, None)
