"""UTF-8 that was read in a one-byte encoding -> the text as it was written, only where that is certain.

A line is repaired when all of it turns back into UTF-8 that French and English text uses: one sound accent beside the
damage and the line stays, so a text that shows mojibake on purpose stays too. A codec gives each byte one character,
so a repair can be undone exactly.
Two things that are lost on the way are put back where the line proves the damage and leaves one reading: bytes that
cp1252 has no character for (`â€` for a closing quote), and the no-break space of `Ã\\xa0` (à) that became a space.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

# Damage upon damage is undone as often as this; more than twice has not been seen.
MAX_TIMES = 4


def _characters(codec: str) -> str:
    """The 256 characters of a codec; as most readers do, an undefined byte is the control character of its number."""
    return "".join(bytes([byte]).decode(codec, "ignore") or chr(byte) for byte in range(256))


# cp1254 is Windows in Turkey. Latin-1 after cp1252: they differ where the one has controls.
WINDOWS = tuple(_characters(codec) for codec in ("cp1252", "latin-1", "cp1254"))
OTHERS = tuple(_characters(codec) for codec in ("mac_roman", "cp437", "cp850"))
# What a repair may give. From Windows: Latin-1 and its controls (a step of twofold damage), œ Œ Š š Ÿ Ž ž, accents,
# the Turkish letters of cp1254 (such a step too), Greek, Cyrillic, punctuation to arrows and dingbats, ligatures,
# variation selectors, byte order mark, emoji.
# From the others Latin-1, œ Œ and punctuation only, as `—é` of mac_roman would be a Cyrillic letter.
UNEXPECTED = re.compile(
    "[^\u0000-\u00ff\u011e\u011f\u0130\u0131\u0152\u0153\u015e-\u0161\u0178\u017d\u017e"
    "\u02c6\u02dc\u0300-\u036f\u0391-\u03c9\u0400-\u045f\u2000-\u2bff\ufb00-\ufb04\ufe0e\ufe0f\ufeff\ufffd\U0001f000-\U0001faff]"
)
UNEXPECTED_OF_OTHERS = re.compile("[^\u0000-\u00ff\u0152\u0153\u2000-\u2bff]")
READINGS = (
    *((table, codecs.charmap_build(table), UNEXPECTED) for table in WINDOWS),
    *((table, codecs.charmap_build(table), UNEXPECTED_OF_OTHERS) for table in OTHERS),
)
# Only Windows loses bytes: the others have a character for each.
LOSSY_READINGS = (READINGS[0], READINGS[2])


def _class(characters: set[str]) -> str:
    return f"[{re.escape(''.join(sorted(characters)))}]"


# The first byte of an expected character, then a continuation byte: a text without the two is passed over fast.
_LEADS = {table[byte] for table in WINDOWS for byte in b"\xc2\xc3\xc4\xc5\xcb\xcc\xcd\xce\xcf\xd0\xd1\xe2\xef\xf0"}
_LEADS_OF_OTHERS = {table[byte] for table in OTHERS for byte in b"\xc2\xc3\xc5\xe2"}
_CONTINUATIONS = {table[byte] for table in WINDOWS + OTHERS for byte in range(0x80, 0xC0)}
SUSPECT = re.compile(_class(_LEADS | _LEADS_OF_OTHERS) + _class(_CONTINUATIONS))
# What no sound French or English holds: where it is left after repair, the text is reported as uncertain.
CLEAR = re.compile("[ÃÂ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€|[ðğ]Ÿ")
# Sound, unless the line has clear damage: `5 Å\xa0;` and `AQUÍ…`. `Å’` is Œ.
SOUND = re.compile("Å[\u00a0»…”–—]|[\u00cb-\u00d1][\u00a0»…’”–—]")
CONTROLS = re.compile("[\u0080-\u009f]")
LOST = re.compile(rb"(\xe2\x80(?![\x80-\xbf])|\xef\xb8(?![\x80-\xbf])|\xf0\x9f[\x80-\xbf]?(?![\x80-\xbf])|\xc3(?= ) ?)")


def repair_mojibake(text: str) -> tuple[str, bool]:
    """The text with every certain line repaired, and whether a sequence that must be mojibake is left in it."""
    if text.isascii() or not SUSPECT.search(text):
        return text, False
    fixed = "\n".join(line if line.isascii() else _repair_line(line) for line in text.split("\n"))
    return fixed, CLEAR.search(fixed) is not None


def _repair_line(line: str) -> str:
    repaired = line
    for _ in range(MAX_TIMES):
        fixed = _decode_whole(repaired) or _decode_cut(repaired)
        if fixed is None or fixed == repaired:
            break
        repaired = fixed
    # A repair that ends in controls went wrong: `Â€` is not U+0080.
    return line if CONTROLS.search(repaired) else repaired


def _decode_whole(line: str) -> str | None:
    if SOUND.search(line) and not CLEAR.search(line):
        return None
    for _, encoder, unexpected in READINGS:
        try:
            fixed = codecs.charmap_encode(line, "strict", encoder)[0].decode("utf-8")
        except UnicodeError:
            continue
        if not unexpected.search(fixed):
            return fixed
    return None


def _decode_cut(line: str) -> str | None:
    """The line with its whole sequences decoded, and its cut ones restored or left as they are."""
    for table, encoder, unexpected in LOSSY_READINGS:
        try:
            pieces = LOST.split(codecs.charmap_encode(line, "strict", encoder)[0])
            sound = [piece.decode("utf-8") for piece in pieces[::2]]
        except UnicodeError:
            continue
        text = "".join(sound)
        if len(pieces) > 1 and not text.isascii() and not unexpected.search(text):
            fixed = sound[0]
            for cut, following in zip(pieces[1::2], sound[1:], strict=True):
                fixed += (_restored(cut, fixed, following) or "".join(table[byte] for byte in cut)) + following
            return fixed
    return None


def _restored(cut: bytes, before: str, following: str) -> str | None:
    """The one character that was cut, told by its neighbours; None where several may have stood there."""
    if cut == b"\xc3 " and not before[-1:].isupper():
        # Of `Ã\xa0 la` with a plain space both stay, or white space was collapsed and one is left.
        return "à" if following.startswith((" ", ",", ".", ")")) else "à "
    if cut == b"\xe2\x80" and before.count("“") > before.count("”"):
        return "”"
    if cut == b"\xef\xb8" and before and unicodedata.category(before[-1]) == "So":
        return "\ufe0f"
    return None
