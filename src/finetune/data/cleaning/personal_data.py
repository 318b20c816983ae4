"""A text -> the first kind of personal data in it, told by pattern and, where there is one, by check digits.

Few false alarms before completeness: numbers that look like one (versions, dates, prices, order numbers), addresses
that belong to nobody (reserved for examples, private networks) and the test cards of payment services do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from finetune.data_sections import PersonalData

EMAIL = re.compile(r"(?<![\w.+/@-])([A-Za-z0-9][\w.+-]*)@((?:[A-Za-z0-9-]+\.)+([A-Za-z]{2,24}))(?![\w@-])")
# RFC 2606 and 6761 reserve these for examples; `logo@2x.png` is a file; `git@` is how repositories are named.
EXAMPLE_DOMAIN = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$", re.IGNORECASE)
FILE_ENDINGS = ("png", "jpg", "jpeg", "gif", "webp", "svg", "pdf", "py", "js", "ts")

# Five pairs of digits with one kind of separator, as France writes them; not a longer row of pairs.
_FRENCH = r"(?<![\d+])(?<!\d[ .-])0[1-9](?P<pair>[ .\u00a0\u202f-])\d\d(?:(?P=pair)\d\d){3}(?!\d|(?P=pair)\d)"
_NORTH_AMERICAN = (
    r"(?<![\w+.-])(?:\(?[2-9]\d\d\) ?|[2-9]\d\d(?P<group>[.-]))(?!555)[2-9]\d\d(?:(?P=group)|-)\d{4}(?![\w]|[.-]\d)"
)
_INTERNATIONAL = r"(?<![\w)+])(?<!\d )(?:\+|00)[1-9]\d{0,2}(?P<rest>(?:[ .\u00a0\u202f-]?(?:\(0\) ?)?\d){7,13})(?!\d)"
# Ten digits in a row are an order number, unless a word before them says that it is a telephone.
_NAMED = (
    r"(?i:\b(?:t[ée]l[ée]?(?:phone)?|phone|mobile|portable|fax|whatsapp|sms|call|appelez)\b)"
    r"[^\n\d]{0,20}(?<!\d)\+?\d{10,12}(?!\d)"
)
PHONE = re.compile(f"{_FRENCH}|{_NORTH_AMERICAN}|{_NAMED}")
INTERNATIONAL_PHONE = re.compile(_INTERNATIONAL)

IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2}\d{2})((?:[ \u00a0]?[A-Z0-9]){11,30})")
# Length by country, from the IBAN registry (SWIFT): the euro area and its neighbours.
IBAN_LENGTHS = {
    **{"NO": 15, "BE": 16, "DK": 18, "FI": 18, "NL": 18, "SI": 19, "AT": 20, "EE": 20, "LT": 20, "LU": 20, "CH": 21},
    **{"HR": 21, "LI": 21, "LV": 21, "BG": 22, "DE": 22, "GB": 22, "IE": 22, "CZ": 24, "ES": 24, "RO": 24, "SE": 24},
    **{"SK": 24, "TN": 24, "PT": 25, "FR": 27, "GR": 27, "IT": 27, "MC": 27, "SM": 27, "CY": 28, "HU": 28, "MA": 28},
    **{"PL": 28, "MT": 31},
}

CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w]|[.,-]\d)")
# Issuers by first digits and length: Visa, Mastercard (two ranges), American Express, Discover, JCB.
ISSUER = re.compile(r"4(?:\d{12}|\d{15})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}")
TEST_CARDS = ("4242424242424242", "4111111111111111", "4012888888881881", "5555555555554444", "378282246310005")

IPV4 = re.compile(r"(?<![\w./-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
# Public unicast addresses begin with 2 or 3.
IPV6 = re.compile(r"(?<![\w:])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{4,34}(?![\w:])")
# Everybody's: they stand in every how-to.
RESOLVERS = ("8.8.8.8", "8.8.4.4", "9.9.9.9", "1.1.1.1", "1.0.0.1", "208.67.222.222", "208.67.220.220")
VERSION_OCTET = 32


def personal_data_in(text: str, kinds: Sequence[PersonalData]) -> PersonalData | None:
    """The first of `kinds`, in their order, that is found in the text."""
    numbers = "\n".join(line for line in text.split("\n") if NUMBERS.search(line)) if NUMBERS.search(text) else ""
    return next((kind for kind in kinds if FINDERS[kind](text if kind == "email" else numbers)), None)


def _has_email(text: str) -> bool:
    if "@" not in text:
        return False
    return any(
        match[1] != "git" and match[3].lower() not in FILE_ENDINGS and not EXAMPLE_DOMAIN.search(match[2])
        for match in EMAIL.finditer(text)
    )


def _has_phone(text: str) -> bool:
    return PHONE.search(text) is not None or any(
        # `+1 000 000 000` is an amount.
        "000" not in match["rest"] and 9 <= sum(map(str.isdigit, match[0])) <= 15
        for match in INTERNATIONAL_PHONE.finditer(text)
    )


def _has_iban(text: str) -> bool:
    return any(_is_iban(re.sub(r"\s", "", match[0])) for match in IBAN.finditer(text))


def _is_iban(text: str) -> bool:
    """ISO 13616: the first four characters go last, letters become 10 to 35, and the number is 1 modulo 97."""
    length = IBAN_LENGTHS.get(text[:2])
    if length is None or len(text) < length:
        return False
    number = "".join(str(int(character, 36)) for character in text[4:length] + text[:4])
    return int(number) % 97 == 1


def _has_card(text: str) -> bool:
    numbers = (re.sub(r"[ -]", "", match[0]) for match in CARD.finditer(text))
    return any(ISSUER.fullmatch(number) and number not in TEST_CARDS and _passes_luhn(number) for number in numbers)


def _passes_luhn(number: str) -> bool:
    """ISO/IEC 7812: every second digit from the right doubled, digits summed, a multiple of 10."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return (doubled + sum(int(digit) for digit in number[-1::-2])) % 10 == 0


def _has_ip_address(text: str) -> bool:
    return any(_is_public_ipv4(match[0]) for match in IPV4.finditer(text)) or any(
        _is_public_ipv6(match[0]) for match in IPV6.finditer(text)
    )


def _is_public_ipv4(text: str) -> bool:
    """Not of a private network, nor a version or section number such as 1.2.3.4: one part must reach VERSION_OCTET."""
    try:
        address = IPv4Address(text)
    except AddressValueError:
        return False
    return address.is_global and text not in RESOLVERS and max(address.packed) >= VERSION_OCTET


def _is_public_ipv6(text: str) -> bool:
    try:
        return IPv6Address(text).is_global
    except AddressValueError:
        return False


# Every number below has a row of seven: lines without one are passed over fast.
NUMBERS = re.compile(r"\d[\dA-Fa-f ().:\u00a0\u202f-]{6}")
FINDERS: dict[PersonalData, Callable[[str], bool]] = {
    "email": _has_email,
    "phone": _has_phone,
    "iban": _has_iban,
    "payment_card": _has_card,
    "ip_address": _has_ip_address,
}
