"""phrases.json -> chat_fr.chatml, chat_en.chatml, tools.jsonl, support_sharegpt.jsonl, tweets.csv in a folder.

Run as `python data/sample/make_sample.py [folder]`; the same bytes come out on every machine. Choices are made by
SHA-256 of what they are made for, so that adding a phrase moves little else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

# DVC hashes this whole folder: running the script must leave no byte code in it.
sys.dont_write_bytecode = True

import faults  # noqa: E402
from faults import Turns  # noqa: E402

Item = TypeVar("Item")
Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
PHRASES: dict[str, Any] = json.loads((HERE / "phrases.json").read_text(encoding="utf-8"))
FACTS: dict[str, Any] = PHRASES["facts"]
HOURS: dict[str, list[int] | None] = PHRASES["hours"]
TOOLS: dict[str, Any] = PHRASES["tools"]
DAYS = list(HOURS)
OPEN_DAYS = [day for day in DAYS if HOURS[day]]
SERVICE_INTENTS = ("price", "delay", "problem", "part", "warranty", "care")
CHAINS = (("price", "delay", "thanks"), ("problem", "warranty", "thanks"), ("delay", "price"), ("part", "price"),
          ("care", "leave"), ("warranty", "part"), ("ready", "hours_open"))  # fmt: skip


def number(*key: object) -> int:
    """A number that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8], "big")


def pick(options: Sequence[Item], *key: object) -> Item:
    """One of `options`, chosen by `key`."""
    return options[number(*key) % len(options)]


def shuffled(items: Iterable[Item], *key: object) -> list[Item]:
    """The items in an order that depends on `key` and on each item."""
    return sorted(items, key=lambda item: number(*key, item))


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def plain(turns: Turns) -> str:
    """What two conversations must not share: lower-case letters and digits without accents, system turns left out."""
    text = " ".join(content for role, content in turns if role != "system")
    return "".join(sign for sign in unicodedata.normalize("NFKD", text.casefold()) if sign.isalnum())


def ready_day(day: str, days: int) -> str:
    """The open day that comes `days` open days after `day`."""
    return OPEN_DAYS[(OPEN_DAYS.index(day) + days) % len(OPEN_DAYS)]


def slots(language: str, service: str, day: str) -> dict[str, Any]:
    """Every word that a template about this service and day can ask for."""
    words, fact = PHRASES[language], FACTS[service]
    values = {**words["services"][service], **words["objects"][fact["object"]], "day": words["days"][day]}
    values |= {"price": fact["price"], "tag": fact["tag"], "days": words["day_counts"][str(fact["days"])]}
    values["months"] = words["month_counts"][str(fact["months"])]
    feminine = values["work"].startswith("la ")
    values |= {"e": "e" if feminine else "", "he": "elle" if feminine else "il"}
    values["of_work"] = f"de {values['work']}" if feminine else f"du {values['work'].removeprefix('le ')}"
    if hours := HOURS[day]:
        values |= dict(zip(("open", "close"), (words["clock"][str(hour)] for hour in hours), strict=True))
        ready = ready_day(day, fact["days"])
        values["ready_day"] = words["following"].format(**values) if ready == day else words["days"][ready]
    for name in ("work", "problem", "my", "your", "the"):
        values[capital(name)] = capital(values[name])
    return values


def exchange(language: str, intent: str, values: dict[str, Any], *key: object) -> Turns:
    """A question and its answer."""
    questions, answers = PHRASES[language]["intents"][intent]
    return qa(questions, answers, values, language, intent, *key)


def qa(questions: Sequence[str], answers: Sequence[str], values: dict[str, Any], *key: object) -> Turns:
    """One of the questions and one of the answers, filled in."""
    question, answer = pick(questions, "q", *key), pick(answers, "a", *key)
    return [["user", question.format(**values)], ["assistant", answer.format(**values)]]


def chain(language: str, intents: Sequence[str], service: str, day: str, *key: object) -> Turns:
    """Two or three exchanges about one service; after the first, the customer asks in short."""
    turns: Turns = []
    for place, intent in enumerate(intents):
        visit = ready_day(day, FACTS[service]["days"]) if intent == "hours_open" else day
        values = slots(language, service, visit)
        pair = exchange(language, intent, values, service, place, *key)
        if place and intent != "thanks":
            pair[0][1] = pick(PHRASES[language]["follow"][intent], service, place, *key).format(**values)
        turns += pair
    return turns


def topics(language: str, copies: int) -> Iterator[Turns]:
    """Conversations that are about no single service."""
    words = PHRASES[language]
    for copy in range(copies):
        for day in DAYS:
            state = "open" if HOURS[day] else "closed"
            for intent in ("hours", "deposit"):
                service = pick(list(FACTS), "topic", day, copy)
                yield exchange(language, f"{intent}_{state}", slots(language, service, day), day, copy)
        for index, (questions, answers) in enumerate(words["faq"]):
            yield qa(questions, answers, {}, language, index, copy)
        for term, definition in words["terms"].items():
            yield exchange(
                language, "term", {"term": term, "Term": capital(term), "definition": definition}, term, copy
            )
        for other in words["others"]:
            yield exchange(language, "other", {"other": other}, other, copy)
        yield exchange(language, "hello", {}, copy) + exchange(language, "thanks", {}, copy)


def totals(language: str) -> Iterator[Turns]:
    """Questions about two services at once."""
    for service in FACTS:
        second = pick([other for other in FACTS if other != service], "total", language, service)
        values = slots(language, service, "tuesday")
        values |= {"work2": PHRASES[language]["services"][second]["work"], "price2": FACTS[second]["price"]}
        yield exchange(language, "total", values | {"sum": values["price"] + values["price2"]}, service)


def chats(language: str, chains: int, copies: int, total: int) -> list[Turns]:
    """`total` conversations without repetition, about half of them with a system turn."""
    found: list[Turns] = []
    for index, service in enumerate(FACTS):
        day = OPEN_DAYS[index % len(OPEN_DAYS)]
        found += [exchange(language, intent, slots(language, service, day), service) for intent in SERVICE_INTENTS]
        found += [chain(language, CHAINS[(index + step) % len(CHAINS)], service, day, step) for step in range(chains)]
    for service in FACTS:
        day = pick(OPEN_DAYS, language, "ready", service)
        found.append(exchange(language, "ready", slots(language, service, day), service))
    unique = {plain(turns): turns for turns in [*found, *topics(language, copies), *totals(language)]}
    chosen = shuffled(unique.values(), language)[:total]
    systems = PHRASES[language]["systems"]
    with_system = [systems[0]] * 4 + systems[1:] + [None] * 6
    named = [(pick(with_system, "system", turns), turns) for turns in chosen]
    return [[["system", system], *turns] if system else turns for system, turns in named]


def call(kind: str, arguments: Row, result: Row, pair: Turns) -> tuple[str, list[Row]]:
    """The kind of tool and a question, a call, its result and the answer."""
    function = {"name": TOOLS[kind]["function"]["name"], "arguments": arguments}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    answered = {"role": "tool", "content": json.dumps(result)}
    return kind, [message(*pair[0]), asked, answered, message(*pair[1])]


def message(role: str, content: str) -> Row:
    """One turn of the `messages` format."""
    return {"role": role, "content": content}


def calls(language: str) -> Iterator[tuple[str, list[Row]]]:
    """Every tool conversation of a language."""
    words, phrases = PHRASES[language], PHRASES[language]["tools"]
    for index, service in enumerate(FACTS):
        values, fact = slots(language, service, OPEN_DAYS[index % 5]), FACTS[service]
        asked = words["intents"]["price"][0]
        result = {"service": service, "price_eur": fact["price"], "days": fact["days"]}
        yield call("price", {"service": service}, result, qa(asked, phrases["price"], values, "tool", service))
        state = pick(sorted(phrases["status"][1]), "state", language, service)
        values["ticket"] = ticket = f"L-{number('ticket', language, service) % 900 + 100}"
        told = qa(phrases["status"][0], [phrases["status"][1][state]], values, "tool", service)
        result = {"ticket": ticket, "item": fact["object"], "state": state}
        yield call("status", {"ticket": ticket}, result, told)
        hour = pick((10, 14, 16), "hour", language, service)
        pair = qa(*phrases["book"], values | {"time": words["clock"][str(hour)]}, "tool", service)
        booking = {"item": fact["object"], "day": OPEN_DAYS[index % 5]}
        yield call("book", booking, {"booked": True, "time": f"{hour}:00"}, pair)
    for day in DAYS:
        hours = HOURS[day]
        pair = exchange(language, "hours_open" if hours else "hours_closed", slots(language, "chain", day), "tool", day)
        yield call("hours", {"day": day}, {"day": day, "open": hours and hours[0], "close": hours and hours[1]}, pair)
    for index, (questions, answers) in enumerate(words["faq"]):
        yield (
            pick(sorted(TOOLS), language, index),
            [message(*turn) for turn in qa(questions, answers, {}, "free", index)],
        )


def tool_rows(language: str, total: int) -> list[Turns]:
    """`total` lines of tools.jsonl: the tool that is needed, sometimes another one; two lines share a group."""
    rows: list[Turns] = []
    for kind, messages in shuffled(calls(language), "tools", language)[:total]:
        names = sorted({kind, pick([*[kind] * 4, *TOOLS], "offer", messages)})
        system = pick([*PHRASES[language]["systems"][:1], None], "system", messages)
        turns = [message("system", system), *messages] if system else messages
        group = f"{language}-{len(rows) // 2:02d}"
        row = {"messages": turns, "tools": [TOOLS[name] for name in names], "group": group}
        rows.append([["raw", json.dumps(row, ensure_ascii=False, separators=(",", ":"))]])
    return rows


def supports(language: str, total: int) -> list[Turns]:
    """`total` conversations with customers who come back: delays, lost tickets, invoices."""
    words, found = PHRASES[language], []
    for index, (kind, (questions, answers)) in enumerate(words["support"].items()):
        for step, service in enumerate(shuffled({FACTS[name]["object"]: name for name in FACTS}.values(), kind)):
            who, he = pick(words["people"], language, service)
            values = slots(language, service, OPEN_DAYS[(index + step) % 5]) | {
                "who": who,
                "Who": capital(who),
                "whohe": he,
            }
            turns = qa(questions, answers, values, kind, service)
            if step % 3 == 0:
                more = exchange(language, "hours_open", values, kind, service)
                more[0][1] = pick(words["follow"]["hours_open"], kind, service).format(**values)
                turns += more
            found.append(turns if step % 2 else turns + exchange(language, "thanks", values, kind, service))
    return shuffled({plain(turns): turns for turns in found}.values(), language)[:total]


def service_tweets() -> Iterator[str]:
    """Every tweet about a single service."""
    for service in FACTS:
        values = slots("fr", service, "tuesday")
        for templates in PHRASES["tweets"]["service"].values():
            yield from (template.format(**values) for template in templates)


def other_tweets() -> Iterator[str]:
    """Tweets about hours, customers and the day's programme, some over several lines, some with `&` or `<`."""
    words = PHRASES["tweets"]
    for day in DAYS:
        templates = words["hours_open" if HOURS[day] else "hours_closed"]
        yield from (template.format(**slots("fr", "chain", day)) for template in templates)
    for index, (name, of_name) in enumerate(words["names"]):
        for copy, template in enumerate(words["thanks"]):
            service = pick(list(FACTS), "thanks", name, copy)
            yield template.format(**slots("fr", service, "tuesday"), name=name, of_name=of_name)
        for template in words["program"]:
            first, second, third = shuffled(FACTS, "program", name, template)[:3]
            jobs = {"job2": slots("fr", second, "tuesday")["job"], "job3": slots("fr", third, "tuesday")["job"]}
            yield template.format(**slots("fr", first, OPEN_DAYS[index % 5]), **jobs)
    for service in shuffled(FACTS, "ampersand")[:8]:
        yield pick(words["ampersand"], "ampersand", service).format(**slots("fr", service, "tuesday"))


def tweets(about_services: int) -> list[Turns]:
    """The tweets, each as one assistant turn."""
    texts = [*shuffled(service_tweets(), "tweets")[:about_services], *other_tweets()]
    return [[["assistant", text]] for text in shuffled(dict.fromkeys(texts), "order")]


def catalogue() -> str:
    """A text that is far longer than any other: everything that the workshop says about its services."""
    intents = PHRASES["fr"]["intents"]
    kinds = ("price", "delay", "part", "warranty", "care")
    return " ".join(intents[kind][1][0].format(**slots("fr", name, "tuesday")) for name in FACTS for kind in kinds)


def main(folder: Path) -> None:
    """Write the five files and log what each holds, as JSON."""
    good: dict[str, list[Turns]] = {
        "chat_fr.chatml": chats("fr", 4, 3, 240),
        "chat_en.chatml": chats("en", 4, 3, 220),
        "tools.jsonl": tool_rows("fr", 46) + tool_rows("en", 38),
        "support_sharegpt.jsonl": supports("fr", 44) + supports("en", 24),
        "tweets.csv": tweets(110),
    }
    for name, rows in good.items():
        content, counts = faults.plant(name, rows, [tuple(fault) for fault in PHRASES["faults"][name]], catalogue())
        (folder / name).write_bytes(content)
        logging.info("%s", json.dumps({"file": name, "good": len(rows), **counts}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
