import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from finetune.data.vocabulary import bpe_training
from finetune.data.vocabulary.bpe import special_tokens, train
from finetune.data.vocabulary.word_counts import WordCounts
from finetune.data_sections import TrainTokenizer
from finetune.pretokenizer import LLAMA3_PATTERN, byte_characters

SAMPLE = Path(__file__).parents[3] / "data" / "sample"
PARAMS = TrainTokenizer(
    strategy="train",
    chat_template="t",
    vocab_size=300,
    min_frequency=2,
    max_words=10_000,
    corpus=None,
    **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": None},
    role_markers=["<|user|>", "<|assistant|>"],
    special_tokens=[],
)
TEXTS = ["le vélo et la lampe", "le vélo rouge", "la lampe et le vélo"] * 3
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_bpe
print(test_bpe.train(test_bpe.TEXTS, test_bpe.PARAMS).to_str())
"""


def with_params(**changes):
    return PARAMS.model_copy(update=changes)


def by_library(texts, params):
    tokenizer = Tokenizer(BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(LLAMA3_PATTERN), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=params.vocab_size,
        min_frequency=params.min_frequency,
        special_tokens=special_tokens(params),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def assert_equal_to_library(texts, params):
    own, library = (json.loads(made(texts, params).to_str()) for made in (train, by_library))
    assert own["model"]["merges"] == library["model"]["merges"]
    assert own == library
    return own["model"]


def test_special_tokens_come_first_in_order_and_every_byte_has_a_token():
    tokenizer = train(TEXTS, PARAMS)
    names = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    # 5 special tokens, 256 bytes, and merges up to the frequency asked for.
    assert 261 < tokenizer.get_vocab_size() <= 300
    assert tokenizer.encode("<s>le vélo</s>").tokens == ["<s>", "le", "ĠvÃ©lo", "</s>"]


def test_the_special_tokens_of_the_notes_get_the_first_ids():
    params = with_params(unk_token="<unk>", special_tokens=["<search>", "</search>"])
    tokenizer = train(TEXTS, params)
    names = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<search>", "</search>"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert tokenizer.encode("<search>le\U0010ffff</search>").tokens == [
        "<search>",
        "le",
        "ô",
        "ı",
        "¿",
        "¿",
        "</search>",
    ]


def test_the_training_text_decides_the_merges_and_no_bos_is_added():
    tokenizer = train(TEXTS, PARAMS)
    assert tokenizer.encode("le").tokens == ["le"]
    assert tokenizer.encode("zq").tokens == ["z", "q"]


def test_the_library_learns_the_same_vocabulary_and_merges_on_the_sample():
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(SAMPLE.glob("*.*l"))]
    params = with_params(vocab_size=2500, unk_token="<unk>")
    model = assert_equal_to_library([line for text in texts for line in text.splitlines()], params)
    assert (len(model["vocab"]), len(model["merges"])) == (2500, 2500 - 256 - 6)


@pytest.mark.parametrize("seed", range(60))
def test_the_library_learns_the_same_from_words_with_ties_and_overlaps(seed):
    sampler = random.Random(seed)  # noqa: S311 (words for a test)
    letters = sampler.choice(["a", "aab", "ab", "aaaabbbb", "abcd", "aé'", "etaoinshr"])
    longest = sampler.choice([6, 20, 80])
    texts = [
        " ".join("".join(sampler.choices(letters, k=sampler.randrange(1, longest))) for _ in range(40))
        for _ in range(sampler.randrange(1, 6))
    ]
    # With "ab" as a special token the text spells one, and no new token is made of its letters.
    params = with_params(
        vocab_size=300 + sampler.randrange(250), min_frequency=seed % 4 + 1, pad_token=["<pad>", "ab"][seed % 2]
    )
    assert_equal_to_library(texts, params)


def test_counting_all_pairs_often_and_in_small_chunks_changes_nothing(monkeypatch):
    texts = (SAMPLE / "chat_fr.chatml").read_text(encoding="utf-8", errors="replace").splitlines()
    expected = train(texts, with_params(vocab_size=2000)).to_str()
    monkeypatch.setattr(bpe_training, "CHUNK_SYMBOLS", 1000)
    monkeypatch.setattr(bpe_training, "CUTOFF_DIVISOR", 2)
    assert train(texts, with_params(vocab_size=2000)).to_str() == expected


def test_counts_beyond_32_bits_are_counted():
    words = WordCounts(
        data=np.frombuffer(b"abac", np.uint8),
        offsets=np.array([0, 2, 4]),
        counts=np.array([2, 5_000_000_000]),
        forgotten_words=0,
        forgotten_occurrences=0,
    )
    vocabulary = bpe_training.learn(words, [], 300, 2, lambda tokens: None)
    assert vocabulary.tokens[256:] == ["ac", "ab"]


def test_the_characters_that_stand_for_bytes_are_the_librarys():
    assert sorted(byte_characters()) == sorted(ByteLevel.alphabet())
    shown = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n~\u00ad")[0][0]
    assert [byte_characters()[byte] for byte in "é \n~\u00ad".encode()] == list(shown)


def test_training_gives_the_same_bytes_under_another_hash_seed_and_parallelism():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "TOKENIZERS_PARALLELISM": parallel,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "false"))
    }
    assert len(outputs) == 1
