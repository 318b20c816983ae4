"""tokenizer files and a GGUF -> the proof that llama.cpp gives a hostile corpus the token ids that training gave it.

Training tokenises with tokenizer.json itself (the `tokenizers` library), so that is what is compared with. The texts
are fixed ones that break splitting rules, each added token between words and spaces, and tokens of the vocabulary drawn
at random, with spaces between them. What llama.cpp is known to do otherwise, and what is therefore not compared:
- Unicode normalisation. A tokenizer with NFC is compared on NFC text, which is what `clean` writes.
- A SentencePiece tokenizer that marks a space at the beginning of a text alone, and not before a text that begins with
  one (Metaspace): compared on texts that begin as the chat template's do, with a special token if it writes one.
- A capital after a small letter that is not a to z, in one word, with the rules of GPT-4o and Mistral's Tekken, for
  which llama.cpp has an approximation ("cafÉ"): no text here has one.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
from tokenizers import Tokenizer

from finetune.chat_template import special_tokens
from finetune.errors import ExportError
from finetune.export.converter import prompt_begin
from finetune.export.gguf_vocab import encode, open_vocab
from finetune.export.parity_chats import CONTENTS
from finetune.export.tokenizer_structure import TOKENIZER, read_structure
from finetune.io import read_json

HOSTILE = (
    "0 12 345 6789 1234567890 3.14 1,000.00 0x1F 1e-6 2026-11-21 ٣٤٥ १२३ Ⅷ ½ x² a1b22c333",
    "I'm you're he'll we've she'd it's don't 'tis O'Neill L'ÉTÉ d'été aujourd'hui I'M YOU'RE HE'LL 'S 'Tokyo' 'été",
    "camelCase XMLHttpRequest snake_case kebab-case SHOUTING iPhone 5th v1.2.3-rc.4",
    "日本語と中文混排123，测试。한국어テスト①②③ ｆｕｌｌｗｉｄｔｈ",
    "🙂👍🏽👨‍👩‍👧‍👦🇫🇷 ✅❤️🏳️‍🌈 ok",
    "नमस्ते दुनिया ไทยภาษา Tiếng Việt עִבְרִית العَرَبِيَّة ქართული Ελληνικά",
    "a b  c   d    e     f\tg\t\th \t i\n\nj\n \nk\n\n\n\nl  \n  m\r\nn\r\ro",
    "!!! ??? ... --- ___ *** ### ``` '''' \"\"\" ((())) [[]] {}{} <> |>|< ;:,.!?…—–«»“”",
    "if (x<=10&&y>=2){return x?a[i]:b->c;}// done\n\t\tfor i in range(0,10):\n            pass\n",
    "https://example.org/a?b=c&d=%20#e me@example.org #tag @user $5.00 €5 50% C++ C#",
    "<s></s><unk><pad> <|im_start|>user<|im_end|> [INST] [/INST] <<SYS>> <start_of_turn> <0x0A> ▁ ▁▁",
    "no\u00a0break narrow\u202fspace wide\u3000space zero\u200bwidth soft\u00adhyphen \ufeffmark line\u2028end",
    "x" * 100 + "é" * 50 + "  " * 40 + "\n" * 20 + "." * 30 + "9" * 25,
    "𝒜𝓁𝑔𝑒𝒷𝓇𝒶 𐍈 𠜎 \ue000 \ufffd \x01\x1f\x7f",
    "\nfirst line is empty",
    "  two spaces before",
    "ends with spaces  ",
    " ",
    "\n",
)
# Letters with a combining mark apart: other ids in a tokenizer that composes them.
DECOMPOSED = unicodedata.normalize("NFD", "été Noël à côté")
WORD_TEXTS, WORD_TOKENS = 200, 12
SHOWN_ADDED = 256


def prove_vocabulary(folder: Path, gguf: Path) -> int:
    """Compare the ids of tokenizer.json in `folder` (merged model or models/tokenizer) with those of `gguf`.

    Returns how many texts were compared, all of them alike. Raises ExportError for the first one that differs, with
    both lists of ids, for other special tokens, and for a GGUF that is not whole.
    """
    tokenizer, vocab = Tokenizer.from_file(str(folder / TOKENIZER)), open_vocab(gguf)
    _compare_specials(folder, tokenizer, vocab, gguf)
    texts = list(dict.fromkeys(probe_texts(folder, tokenizer)))
    for text in texts:
        _compare(text, tokenizer.encode(text, add_special_tokens=False).ids, encode(vocab, text, add_bos=False), gguf)
    # What is put around a text by the tokenizer's own rule.
    _compare("", tokenizer.encode("").ids, encode(vocab, "", add_bos=True), gguf)
    return len(texts) + 1


def probe_texts(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts to compare, as far as llama.cpp can follow the tokenizer's rule for spaces and normal forms."""
    structure = read_structure(folder)
    begin = prompt_begin(folder, tokenizer) if structure.space_prefix == "beginning" else ""
    composes = read_json(folder / TOKENIZER).get("normalizer") is not None and structure.model == "gpt2"
    for text in _texts(tokenizer, pieces_follow=begin is not None):
        composed = unicodedata.normalize("NFC", text) if composes else text
        yield (begin or "") + (composed if structure.strict_spaces or begin else composed.lstrip(" "))


def _texts(tokenizer: Tokenizer, *, pieces_follow: bool) -> Iterator[str]:
    """`pieces_follow`: text after an added token is compared too."""
    yield from (content for _, content in CONTENTS)
    yield from (*HOSTILE, DECOMPOSED)
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    for token in added[:SHOWN_ADDED]:
        yield f"word{token}"
        if pieces_follow:
            yield from (f"a{token}b", f"a {token} b", f"{token}\n\nb", f"{token}{token}  b")
    source = random.Random(0)  # noqa: S311 (equal texts on every run, no secret)
    numbers = sorted(set(range(tokenizer.get_vocab_size())) - set(tokenizer.get_added_tokens_decoder()))
    for _ in range(WORD_TEXTS):
        yield " ".join(tokenizer.decode([number]) for number in source.choices(numbers, k=WORD_TOKENS))


def _compare(text: str, expected: list[int], obtained: list[int], gguf: Path) -> None:
    if expected != obtained:
        raise ExportError(
            f"the text {text!r} has other token ids than in training:\n  tokenizer {expected}\n  GGUF      {obtained}",
            gguf,
            "convert it again from the merged model with this tokenizer: `dvc repro -f quantize_gguf`; if it fails "
            "again, llama.cpp cannot follow this tokenizer: train one with tokenizer.strategy: train",
        )


def _compare_specials(folder: Path, tokenizer: Tokenizer, vocab: llama_cpp.Llama, gguf: Path) -> None:
    handle, tokens = llama_cpp.llama_model_get_vocab(vocab.model), special_tokens(folder)
    readers = {"eos_token": llama_cpp.llama_vocab_eos, "bos_token": llama_cpp.llama_vocab_bos}
    for name, reader in readers.items():
        expected, obtained = tokens.get(name), int(reader(handle))
        if expected is not None and tokenizer.token_to_id(expected) != obtained:
            raise ExportError(
                f"its {name} is token {obtained}, the tokenizer's is {expected} ({tokenizer.token_to_id(expected)})",
                gguf,
                "it was made with another tokenizer: run `dvc repro -f quantize_gguf`",
            )
