"""French and English conversations of any size, by the word frequencies of wordfreq: `chat_corpus.py MB SEED FILE`.

Words are drawn one by one by how often they are used (320,000 English and 310,000 French ones), so the number of
different words grows with the text as in real text, or faster. Markdown, lists, code, figures and the punctuation of
both languages are mixed in. Needs wordfreq (prepare_rows.py runs it in an environment of its own) and nothing else.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import accumulate
from pathlib import Path

import wordfreq  # type: ignore[import-not-found, unused-ignore]  # only in the environment made for it

LANGUAGES = ("en", "fr")
MARKS = {"en": (".", "?", "!", ":"), "fr": (".", " ?", " !", " :")}
QUOTES = {"en": '"{}"', "fr": "« {} »"}
ELISIONS = {"en": ("{}'s", "{}’s", "{}n't"), "fr": ("l'{}", "d'{}", "qu'{}", "l’{}")}


class Writer:
    """Draws text from a seeded generator and the frequency lists."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)  # noqa: S311 (a benchmark's text)
        self.words: dict[str, list[str]] = {}
        self.cumulative: dict[str, list[float]] = {}
        for language in LANGUAGES:
            frequencies = wordfreq.get_frequency_dict(language, "large")
            self.words[language] = sorted(frequencies, key=lambda word: (-frequencies[word], word))
            self.cumulative[language] = list(accumulate(frequencies[word] for word in self.words[language]))

    def sentence(self, language: str, words: int) -> str:
        """A sentence of so many words."""
        drawn = self.draw.choices(self.words[language], cum_weights=self.cumulative[language], k=words)
        drawn = [self._dressed(word, language) for word in drawn]
        mark = self.draw.choices(MARKS[language], [80, 10, 6, 4])[0]
        return " ".join([drawn[0].capitalize(), *drawn[1:]]) + mark

    def paragraph(self, language: str, characters: int) -> str:
        """Sentences up to about so many characters."""
        sentences: list[str] = []
        while sum(map(len, sentences)) < characters:
            sentences.append(self.sentence(language, self.draw.randint(4, 28)))
        return " ".join(sentences)

    def answer(self, language: str) -> str:
        """One to five blocks: paragraphs, lists and code."""
        blocks = []
        for _ in range(self.draw.choices([1, 2, 3, 5], [5, 3, 2, 1])[0]):
            kind = self.draw.choices(["numbered", "bullets", "code", "paragraph"], [12, 8, 7, 73])[0]
            if kind == "numbered":
                items = [
                    (self.sentence(language, 3), self.sentence(language, 9)) for _ in range(self.draw.randint(2, 6))
                ]
                blocks.append("\n".join(f"{at}. **{title}** {text}" for at, (title, text) in enumerate(items, 1)))
            elif kind == "bullets":
                blocks.append("\n".join(f"- {self.sentence(language, 8)}" for _ in range(self.draw.randint(2, 5))))
            elif kind == "code":
                blocks.append(self._code())
            else:
                blocks.append(self.paragraph(language, self.draw.randint(80, 700)))
        return "\n\n".join(blocks)

    def conversation(self) -> list[dict[str, str]]:
        """One to six exchanges, three in ten after a system turn."""
        language = self.draw.choice(LANGUAGES)
        turns = []
        if self.draw.random() < 0.3:
            turns.append({"role": "system", "content": self.sentence(language, 12)})
        for _ in range(self.draw.choices([1, 2, 3, 4, 6], [4, 3, 2, 1, 1])[0]):
            question = self.paragraph(language, self.draw.randint(20, 250))
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": self.answer(language)}]
        return turns

    def _dressed(self, word: str, language: str) -> str:
        chance = self.draw.random()
        if chance < 0.9:
            return word
        if chance < 0.94:
            return word.capitalize()
        if chance < 0.95:
            return str(self.draw.randint(0, 10 ** self.draw.randint(1, 6)))
        if chance < 0.975:
            return self.draw.choice(ELISIONS[language]).format(word)
        return self.draw.choice((QUOTES[language], "({})", "{},", "{};")).format(word)

    def _code(self) -> str:
        words = self.words["en"]
        name = f"{self.draw.choice(words[:5000])}_{self.draw.choice(words[:20000])}"
        lines = [f"def {name}({self.draw.choice(words[:500])}, {self.draw.choice(words[:500])}=None):"]
        for _ in range(self.draw.randint(2, 8)):
            left, right, method = (self.draw.choice(words[:3000]) for _ in range(3))
            comment = self.sentence("en", 4)
            lines.append(f"    {left} = {right}.{method}({self.draw.randint(0, 999)})  # {comment}")
        lines.append(f"    return {self.draw.choice(words[:3000])}")
        return "```python\n" + "\n".join(lines) + "\n```"


def main() -> None:
    """Write `{"messages": [...]}` lines until the file has the size asked for, in millions of bytes."""
    megabytes, seed, target = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    writer, written = Writer(seed), 0
    with target.open("wb") as handle:
        while written < megabytes * 1_000_000:
            written += handle.write(
                json.dumps({"messages": writer.conversation()}, ensure_ascii=False).encode() + b"\n"
            )


if __name__ == "__main__":
    main()
