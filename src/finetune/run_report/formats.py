"""Numbers -> texts for a person: as many digits as mean something, with their unit; None is said, never left blank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

NOT_MEASURED = "not measured"
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
# A number and its unit stay on one line.
NO_BREAK = "\u00a0"


def count(value: float) -> str:
    """A whole number: 1,234,567."""
    return f"{value:,.0f}"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never in powers of ten: 0.0000793, 29.9, 12,346."""
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{Decimal(f'{value:.{digits - 1}e}'):f}"


def exact(value: float) -> str:
    """A setting as it was given, never in powers of ten: 0.0002, 1, 0.05."""
    return f"{Decimal(repr(float(value))).normalize():f}"


def ratio(value: float) -> str:
    """A ratio: × 0.4546; four decimals, as quantisation changes the fourth one."""
    return f"×{NO_BREAK}{bare_ratio(value)}"


def bare_ratio(value: float) -> str:
    """`ratio` without its sign, for intervals: 0.4546."""
    return f"{value:.4f}" if value < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share: 36.1 %."""
    return f"{100 * value:.1f}{NO_BREAK}%"


def size(size_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves one before the point: 1.64 MiB."""
    power = 0
    while size_bytes >= 1024 and power + 1 < len(UNITS):
        size_bytes, power = size_bytes / 1024, power + 1
    return f"{count(size_bytes) if power == 0 else significant(size_bytes)}{NO_BREAK}{UNITS[power]}"


def interval(bounds: Mapping[str, Any] | None, form: Callable[[Any], str]) -> str:
    """A 95 % interval {low, high} in the form of its figure: `0.4313 to 0.4781`."""
    return NOT_MEASURED if bounds is None else f"{form(bounds['low'])} to {form(bounds['high'])}"


def visible(text: str) -> str:
    """The text as valid HTML can hold it: control characters as their pictures (U+2400), no surrogates."""
    return "".join(map(_visible, text))


def shorten(text: str, characters: int) -> str:
    """The start of a text, and how much was left out."""
    left_out = len(text) - characters
    return text if left_out <= 0 else f"{text[:characters]}… ({left_out:,} more characters)"


def _visible(sign: str) -> str:
    code = ord(sign)
    if sign in "\n\t" or 0x20 <= code < 0x7F or (code >= 0xA0 and not 0xD800 <= code < 0xE000):
        return sign
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
