import pytest
from test_bpe import PARAMS, TEXTS
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFC, NFD, NFKC, Lowercase, Sequence

from finetune.chat_template import compile_template
from finetune.data.vocabulary.bpe import train
from finetune.data.vocabulary.tokenizer_report import (
    HOSTILE_TEXTS,
    check_markers,
    check_round_trip,
    fertility,
    marker_tokens,
    rendered_probes,
)
from finetune.errors import DataError


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


def test_tokens_and_bytes_by_language():
    tokenizer = train(TEXTS, PARAMS)
    assert tokenizer.encode("le le").tokens == ["le", "Ġle"]
    assert fertility({"unknown": ["zq"], "fr": ["le vélo", "le le"]}, tokenizer) == {
        "fr": {"records": 2, "tokens_per_word": 1.0, "tokens_per_character": 0.3333, "bytes_per_token": 3.25},
        "unknown": {"records": 1, "tokens_per_word": 2.0, "tokens_per_character": 1.0, "bytes_per_token": 1.0},
    }


def test_markers_are_found_where_a_template_builds_them_and_plain_text_ones_are_counted():
    tokenizer = train(TEXTS, PARAMS)
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{{ '<|' + m.role + '|>' + m.content }}<bot>[INST] <<SYS>> a < b > c [x]{% endfor %}{{ eos_token }}"
    )
    template = compile_template(source, {"bos_token": "<s>", "eos_token": "</s>"}, "here")
    assert marker_tokens(tokenizer, rendered_probes(template)) == {
        "</s>": 1,
        "<<SYS>>": 7,
        "<bot>": 5,
        "<s>": 1,
        "<|assistant|>": 1,
        "<|tool|>": 8,
        "<|user|>": 1,
        "[INST]": 6,
    }
