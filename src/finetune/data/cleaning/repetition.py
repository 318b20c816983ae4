"""A text -> whether a character or a short unit of it is repeated without end, as a broken model or a bored user does.

A unit has 1 to 4 characters. White space does not count, nor do code, rules that stand alone on a line (`----`,
`| --- | --- |`) and the blanks and leaders of forms and contents (`____`, `.....`).
"""

from __future__ import annotations

import re
from functools import lru_cache

# A text that repeats units of 1, 2, 3 or 4 characters is the same every 12 characters.
PERIOD = 12
CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
RULES = re.compile(r"^[-=_*#.~+|:─━═ \t]+$|[_.…]{3,}", re.MULTILINE)


def repeats(text: str, max_repeated: int) -> bool:
    """Whether a unit is repeated more than `max_repeated` times in a row."""
    if not (_may_repeat_one(text, max_repeated) or _may_repeat_several(text, max_repeated)):
        return False
    prose = RULES.sub("\n", CODE.sub("\n", text))
    return _repeated(max_repeated).search(prose) is not None


def _may_repeat_one(text: str, max_repeated: int) -> bool:
    """Look at one character in `step` only: a run holds at least `samples` of them. Five times as fast."""
    step = max(1, (max_repeated + 1) // 3)
    samples = (max_repeated + 1) // step
    runs = {match[1] for match in _equal(samples).finditer(text[::step])}
    return any(character * (max_repeated + 1) in text for character in runs if not character.isspace())


def _may_repeat_several(text: str, max_repeated: int) -> bool:
    blocks = 2 * (max_repeated + 1) // PERIOD
    if blocks < 2:
        return True
    for match in _equal(blocks).finditer(text[::PERIOD]):
        for block in range(match.start(), match.end() - blocks + 1):
            # What lies between the first and the last of these samples must be periodic.
            start, length = block * PERIOD, (blocks - 2) * PERIOD
            if text.startswith(text[start : start + length], start + PERIOD):
                return True
    return False


@lru_cache(maxsize=4)
def _equal(count: int) -> re.Pattern[str]:
    return re.compile(rf"(.)\1{{{count - 1},}}", re.DOTALL)


@lru_cache(maxsize=4)
def _repeated(max_repeated: int) -> re.Pattern[str]:
    return re.compile(rf"(\S[^\n]{{0,3}}?)\1{{{max_repeated}}}")
