import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFC, NFD, NFKC, Lowercase, Sequence

from finetune.data.bpe import HOSTILE_TEXTS, check_markers, check_round_trip, fertility, train
from finetune.data.record import make_record
from finetune.data_sections import TrainTokenizer
from finetune.errors import DataError

PARAMS = TrainTokenizer(
    strategy="train",
    chat_template="t",
    vocab_size=300,
    min_frequency=2,
    **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    role_markers=["<|user|>", "<|assistant|>"],
)
TEXTS = ["le vélo et la lampe", "le vélo rouge", "la lampe et le vélo"] * 3
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_bpe
print(test_bpe.train(test_bpe.TEXTS, test_bpe.PARAMS).to_str())
"""


def test_special_tokens_come_first_in_order_and_every_byte_has_a_token():
    tokenizer = train(TEXTS, PARAMS)
    names = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    # 5 special tokens, 256 bytes, and merges up to the frequency asked for.
    assert 261 < tokenizer.get_vocab_size() <= 300
    assert tokenizer.encode("<s>le vélo</s>").tokens == ["<s>", "le", "ĠvÃ©lo", "</s>"]


def test_the_training_text_decides_the_merges_and_no_bos_is_added():
    tokenizer = train(TEXTS, PARAMS)
    assert tokenizer.encode("le").tokens == ["le"]
    assert tokenizer.encode("zq").tokens == ["z", "q"]


def test_hostile_texts_come_back_unchanged():
    tokenizer = train(TEXTS, PARAMS)
    check_round_trip(tokenizer)
    for text in HOSTILE_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_tokenizer_that_loses_text_is_refused():
    with pytest.raises(DataError, match="comes back as"):
        check_round_trip(Tokenizer(WordLevel({"?": 0}, "?")))


@pytest.mark.parametrize("normalizer", [NFC(), Sequence([NFC()])])
def test_a_normaliser_that_does_nfc_alone_is_accepted(normalizer):
    tokenizer = train(TEXTS, PARAMS)
    tokenizer.normalizer = normalizer
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "é"
    check_round_trip(tokenizer)


@pytest.mark.parametrize("normalizer", [NFD(), NFKC(), Sequence([NFC(), Lowercase()])])
def test_a_normaliser_that_changes_clean_text_is_refused(normalizer):
    tokenizer = train(TEXTS, PARAMS)
    tokenizer.normalizer = normalizer
    with pytest.raises(DataError, match="comes back as"):
        check_round_trip(tokenizer)


def test_a_marker_of_several_tokens_is_refused():
    tokenizer = train(TEXTS, PARAMS)
    check_markers(tokenizer, PARAMS.role_markers)
    with pytest.raises(DataError, match=r"role marker <\|tool\|> becomes \['<', '\|', 't', 'o', 'o', 'l', '\|', '>'\]"):
        check_markers(tokenizer, ["<|tool|>"])
    tokenizer.add_special_tokens([AddedToken("<|tool|>")])
    check_markers(tokenizer, ["<|tool|>"])


def test_tokens_per_word_and_character_by_language():
    tokenizer = train(TEXTS, PARAMS)
    records = [
        make_record(source="s", text="le vélo", language="fr"),
        make_record(source="s", text="le le", language="fr"),
        make_record(source="s", text="zq"),
    ]
    assert tokenizer.encode("le le").tokens == ["le", "Ġle"]
    assert fertility(records, tokenizer) == {
        "fr": {"records": 2, "tokens_per_word": 1.0, "tokens_per_character": 0.3333},
        "unknown": {"records": 1, "tokens_per_word": 2.0, "tokens_per_character": 1.0},
    }


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
