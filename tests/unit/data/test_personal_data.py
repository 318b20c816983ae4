import pytest

from finetune.data.cleaning.personal_data import personal_data_in

ALL = ("email", "phone", "iban", "payment_card", "ip_address")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Écrivez à jeanne.martin+courses@atelier-bois.fr, merci.", "email"),
        ("<A_B-c@mail.univ-lyon.co.uk>", "email"),
        ("Appelez le 06 12 34 56 78.", "phone"),
        ("Tel: 01.45.67.89.10", "phone"),
        ("01-45-67-89-10", "phone"),
        ("au 06\u00a012\u00a034\u00a056\u00a078", "phone"),
        ("Tél : 0612345678", "phone"),
        ("my phone is 2125550187", "phone"),
        ("+33 6 12 34 56 78", "phone"),
        ("+33 (0)6 12 34 56 78", "phone"),
        ("0033612345678", "phone"),
        ("+33612345678", "phone"),
        ("Call (212) 736-5000 today", "phone"),
        ("212-736-5000", "phone"),
        ("+44 20 7946 0958", "phone"),
        ("FR14 2004 1010 0505 0001 3M02 606", "iban"),
        ("Virement : FR1420041010050500013M02606.", "iban"),
        ("DE89 3704 0044 0532 0130 00 BIC COBADEFF", "iban"),
        ("GB82 WEST 1234 5698 7654 32", "iban"),
        ("Carte 4539 1488 0343 6467, merci", "payment_card"),
        ("4539148803436467", "payment_card"),
        ("5425-2334-3010-9903", "payment_card"),
        ("3714 496353 98431", "payment_card"),
        ("Connexion depuis 82.65.123.45 hier", "ip_address"),
        ("[2a01:cb00:12:3400:5e6f:aa:bb:cc]", "ip_address"),
    ],
)
def test_personal_data_is_found(text, kind):
    assert personal_data_in(text, ALL) == kind
    assert personal_data_in("Une ligne.\n" + text + "\nUne autre.", (kind,)) == kind
    assert personal_data_in(text, [other for other in ALL if other != kind]) is None


@pytest.mark.parametrize(
    "text",
    [
        # Addresses that are nobody's, and what only looks like one.
        "jean@example.com, a@b.test, contact@mail.example.org, root@localhost, x@host.local",
        "git clone git@github.com:a/b.git; logo@2x.png; @types/node@18.0.1; @app.route; 3 @ 4.50; a@b",
        # Dates, times, prices, versions, measures, references.
        "le 12/05/2023 à 10:30:45, 2023-05-12T10:30:45.123456Z, 01.02.2003, 20230512103045",
        "1 234 567,89 €, $1,299.00, 12 345 678 habitants, +1 000 000 000 $, 3.14159265358979323846",
        "Chrome/114.0.5735.198, v10.0.19041.1, version 1.2.3.4, section 1.2.10.4, Python 3.11.7",
        "Commande 0612345678, n° 4012345678, facture 2023-000123456, réf. 00012345678901",
        "ISBN 978-2-07-036822-8, SIRET 732 829 320 00074, code postal 75011, tweet 1234567890123456789",
        "05 12 23 34 45 06 17 sont les numéros tirés, et 10 20 30 40 50 aussi",
        "555-0123, (212) 555-0187, 100-200-3000, 192-168-1000",
        # Wrong check digits, test cards, long numbers.
        "FR14 2004 1010 0505 0001 3M02 607, FR76 1234 5678 9012 3456 7890 123, AB12 3456 7890 1234 5678",
        "4539 1488 0343 6468, 4242 4242 4242 4242, 4111111111111111, 0.4539148803436467, 1234567812345670",
        # Private, reserved and everybody's addresses; times, MAC addresses, C++.
        "127.0.0.1, 192.168.1.20, 10.1.2.3, 172.16.5.4, 0.0.0.0, 255.255.255.0, 203.0.113.7, 8.8.8.8, 256.300.1.1",
        "::1, fe80::1, 2001:db8::1, 00:1A:2B:3C:4D:5E, 12:34:56, std::abs, dead::beef, 2023:05",
        "192.168.1.0/24, 82.65.123.45.6, http://x/82.65.123.45-b",
        "",
    ],
)
def test_what_only_looks_like_personal_data_is_not(text):
    assert personal_data_in(text, ALL) is None


def test_the_first_kind_asked_for_is_named():
    text = "a@b.fr, 06 12 34 56 78"
    assert personal_data_in(text, ("phone", "email")) == "phone"
    assert personal_data_in(text, ("email", "phone")) == "email"
    assert personal_data_in(text, ()) is None
