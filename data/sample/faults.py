"""Good rows -> the bytes of a sample file with known faults planted in it, and the number of each.

A row is a list of [role, text]; the role `raw` holds a line that is written as it stands.
"""

from __future__ import annotations

import csv
import datetime
import html
import io
import json
from collections import Counter
from collections.abc import Sequence

Turns = list[list[str]]
Kinded = tuple[str, Turns]

FIRST_DAY = datetime.date(2024, 3, 1)
TWEETS_A_DAY = 2
FIRST_TWEET, TWEET_STEP = 1_763_500_000_000_000_000, 86_000_000_007_919
SIGNATURE = " Vélos & lampes, 12, rue des Lilas."
REPAIRABLE = frozenset("àâçéèêëîïôùûœÉÀ«»€’")
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
# per file: answers to damage by mojibake, answers to sign with an `&`, exact duplicates, duplicates typed differently
DAMAGE = {
    "chat_fr.chatml": (4, 0, 4, 2),
    "chat_en.chatml": (0, 0, 3, 1),
    "tools.jsonl": (0, 0, 3, 0),
    "support_sharegpt.jsonl": (2, 2, 2, 1),
    "tweets.csv": (2, 0, 3, 2),
}


def mojibake(text: str) -> str:
    """`text` in UTF-8 read as cp1252, after its apostrophes became typographic."""
    return text.replace("'", "’").encode("utf-8").decode("cp1252")


def signed(text: str) -> str:
    """`text` with a signature that holds an `&`, escaped as HTML."""
    return html.escape(text + SIGNATURE, quote=False)


def retyped(turns: Turns, upper: bool) -> Turns:
    """The same conversation in capitals, or with doubled spaces."""
    return [[role, text.upper() if upper else text.replace(" ", "  ")] for role, text in turns]


def with_answer(turns: Turns, answer: str) -> Turns:
    """The conversation with another last answer."""
    return [*turns[:-1], ["assistant", answer]]


def damageable(turns: Turns) -> bool:
    """True where the last answer holds at least two letters that mojibake damages, and the repair is certain."""
    role, text = turns[-1]
    foreign = [sign for sign in text if not sign.isascii()]
    return role != "raw" and len(foreign) >= 2 and REPAIRABLE.issuperset(foreign)


def spread(indexes: Sequence[int], count: int) -> list[int]:
    """`count` of the indexes, evenly spaced."""
    return [indexes[place * len(indexes) // count] for place in range(count)]


def weave(rows: Sequence[Turns], extras: Sequence[Kinded], gaps: Sequence[int]) -> list[Kinded]:
    """The rows, each extra before another one of `gaps` (indexes of rows)."""
    before = dict(zip(spread(gaps, len(extras)), extras, strict=True))
    woven: list[Kinded] = []
    for index, row in enumerate(rows):
        woven += [before[index]] if index in before else []
        woven.append(("good", row))
    return woven


def chatml(turns: Turns) -> str:
    """A conversation of a chatml file; an empty text leaves its marker alone."""
    return "".join(f"<|{role}|>\n{text}\n" if text else f"<|{role}|>\n" for role, text in turns)


def json_line(turns: Turns, sharegpt: bool) -> str:
    """A line of a JSON-lines file, in the ShareGPT or the messages format."""
    if turns[0][0] == "raw":
        return f"{turns[0][1]}\n"
    messages = [{"role": role, "content": text} for role, text in turns]
    values = [{"from": SHAREGPT.get(role, role), "value": text} for role, text in turns]
    return json.dumps({"conversations": values} if sharegpt else {"messages": messages}, ensure_ascii=False) + "\n"


def tweet(turns: Turns, place: int) -> str:
    """A row of tweets.csv: its text with `&`, `<` and `>` escaped, as the platform exports it."""
    moment = f"{FIRST_DAY + datetime.timedelta(days=place // TWEETS_A_DAY)} {9 + place % 8:02d}:{place % 60:02d}:00"
    text = html.escape(turns[0][1], quote=False)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow((FIRST_TWEET + place * TWEET_STEP, text, moment))
    return buffer.getvalue()


def render(name: str, woven: Sequence[Kinded]) -> bytes:
    """The bytes of one sample file; rows of kind `invalid_utf8` are written in Latin-1."""
    parts: list[bytes] = []
    for place, (kind, turns) in enumerate(woven):
        if name.endswith(".chatml"):
            text = chatml(turns)
        elif name.endswith(".csv"):
            text = tweet(turns, place)
        else:
            text = json_line(turns, sharegpt="sharegpt" in name)
        parts.append(text.encode("latin-1" if kind == "invalid_utf8" else "utf-8"))
    if name.endswith(".csv"):
        return b"id_tweet,texte,date_creation\n" + b"".join(parts)
    return (b"\n" if name.endswith(".chatml") else b"").join(parts)


def plant(name: str, good: Sequence[Turns], handmade: Sequence[Kinded], long_text: str) -> tuple[bytes, dict[str, int]]:
    """The file's bytes and the number of faults of each kind.

    Duplicates copy the first half and stand in the second, so that the good one comes first. In chatml files a fault
    stands before a conversation that opens with a system turn, which ends the one before it whatever it lacks.
    """
    rows, half = list(good), len(good) // 2
    broken, with_ampersand, exact, typed = DAMAGE[name]
    counts = Counter(mojibake=broken, html_entity=with_ampersand)
    if name.endswith(".csv"):
        counts["html_entity"] += sum(html.escape(row[0][1], quote=False) != row[0][1] for row in rows)
    hurt = spread([index for index in range(half) if damageable(rows[index])], broken + with_ampersand)
    for place, index in enumerate(hurt):
        rows[index] = with_answer(rows[index], (mojibake if place < broken else signed)(rows[index][-1][1]))
    sources = spread([index for index in range(half) if index not in hurt], exact + typed)
    extras = [("exact_duplicate", rows[index]) for index in sources[:exact]]
    for place, index in enumerate(sources[exact:]):
        extras.append(("retyped_duplicate", retyped(rows[index], upper=place % 2 == 0)))
    extras += [(kind, with_answer(turns, long_text) if kind == "over_long" else turns) for kind, turns in handmade]
    counts.update(kind for kind, _ in extras)
    gaps = [place for place in range(half, len(rows)) if ".chatml" not in name or rows[place][0][0] == "system"]
    return render(name, weave(rows, extras, gaps)), {kind: counts[kind] for kind in sorted(counts) if counts[kind]}
