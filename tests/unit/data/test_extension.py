import pytest
from huggingface_hub import constants
from test_bpe import PARAMS, TEXTS
from transformers import AutoTokenizer

from finetune.data.fetching.hub import Repo
from finetune.data.vocabulary.bpe import train
from finetune.data.vocabulary.extension import extend_base
from finetune.data.vocabulary.tokenizer_files import choose_pad_token, copy_base_tokenizer, install_templates, load_chat
from finetune.data_sections import NewToken
from finetune.errors import DataError
from finetune.io import read_json, sha256_tree, write_json, write_text

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
SPECIAL = ["<|reserved_0|>", "<|reserved_1|>"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base of 282 tokens and 320 embedding rows in the layout of the Hub cache; returns its manifest and a folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = Repo("team/base", "model", "0" * 40)
    snapshot = tmp_path / "hub" / "models--team--base" / "snapshots" / repo.revision
    params = PARAMS.model_copy(
        update={"pad_token": "<fill>", "special_tokens": SPECIAL, "min_frequency": 1, "vocab_size": 290}
    )
    tokenizer = train(TEXTS, params)
    write_text(snapshot / "tokenizer.json", tokenizer.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "extra_special_tokens": SPECIAL,
        "added_tokens_decoder": {"5": {"content": SPECIAL[0], **FLAGS}, "6": {"content": SPECIAL[1], **FLAGS}},
    }
    write_json(snapshot / "tokenizer_config.json", config)
    write_json(snapshot / "config.json", {"vocab_size": 320})
    files = [{"path": name} for name in ("tokenizer.json", "tokenizer_config.json", "config.json")]
    folder = tmp_path / "out"
    folder.mkdir()
    manifest = {"repo_id": repo.repo_id, "revision": repo.revision, "files": files}
    assert copy_base_tokenizer(manifest, folder).get_vocab_size() == 282
    write_text(tmp_path / "template.jinja", TEMPLATE)
    install_templates(tmp_path / "template.jinja", folder)
    return manifest, folder


def token(text, place="add", reserved=None):
    return NewToken(text=text, place=place, reserved=reserved)


def test_a_reserved_token_keeps_its_id_an_added_one_comes_last_and_text_stays_text(base):
    manifest, folder = base
    tokens = [token("<call>", "reserved", "<|reserved_1|>"), token("<|pad|>"), token("le<x>"), token("<bot>", "text")]
    assert extend_base(folder, tokens, manifest) == {
        "<call>": {"place": "reserved", "tokens_before": 6, "tokens": 1},
        "<|pad|>": {"place": "add", "tokens_before": 7, "tokens": 1},
        "le<x>": {"place": "add", "tokens_before": 4, "tokens": 1},
        "<bot>": {"place": "text", "tokens_before": 5, "tokens": 5},
    }
    # Tokens 282 and 283 fall into the base's padding, so its table does not grow.
    assert read_json(folder / "extension.json") == {
        "trained_rows": {"<call>": 6, "<|pad|>": 282, "le<x>": 283},
        "rows_before": 320,
        "rows_after": 320,
    }
    choose_pad_token(folder)
    chat = load_chat(folder)
    assert (chat.ids.pad, chat.ids.vocab_size) == (282, 284)
    assert chat.tokenizer.encode("le<call>le<x><|pad|>").ids == [chat.tokenizer.token_to_id("le"), 6, 283, 282]
    assert chat.tokenizer.token_to_id("<|reserved_1|>") is None


def test_transformers_reads_the_same_ids(base):
    manifest, folder = base
    extend_base(folder, [token("<call>", "reserved", "<|reserved_0|>"), token("<|pad|>")], manifest)
    choose_pad_token(folder)
    loaded = AutoTokenizer.from_pretrained(str(folder))
    assert loaded("<call>le<|pad|>")["input_ids"] == load_chat(folder).tokenizer.encode("<call>le<|pad|>").ids
    assert (loaded.pad_token_id, loaded.convert_tokens_to_ids("<call>")) == (282, 5)
    assert "<|reserved_0|>" not in loaded.get_vocab()
    assert loaded.decode([5, 282], skip_special_tokens=True) == ""


def test_a_table_without_padding_grows(base):
    manifest, folder = base
    extend_base(folder, [token(f"<{number}>") for number in range(40)], manifest)
    numbers = read_json(folder / "extension.json")
    assert (numbers["rows_before"], numbers["rows_after"]) == (320, 322)
    assert numbers["trained_rows"]["<39>"] == 321


def test_plain_text_alone_trains_no_rows(base):
    manifest, folder = base
    before = sha256_tree(folder)
    extend_base(folder, [token("<bot>", "text")], manifest)
    assert sha256_tree(folder) == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([token("<|user|>")], r"<\|user\|>: the base has this token already"),
        ([token("le", "text")], "le: the base has this token already"),
        ([token("<x>", "reserved", "<|reserved_9|>")], r"<\|reserved_9\|> is none of the 7 added tokens of the base"),
        ([token("<x>", "reserved", "</s>")], "</s> is in use"),
        ([token("<x>", "reserved", "<|assistant|>")], r"<\|assistant\|> is in use"),
        ([token("<x>", "reserved", "le")], "le is none of"),
        ([token("<x>", "reserved", "z")], "z is none of"),
    ],
)
def test_a_token_that_is_there_or_a_reserved_one_that_is_not_free_is_refused(base, tokens, message):
    manifest, folder = base
    before = (folder / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match=message):
        extend_base(folder, tokens, manifest)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert not (folder / "extension.json").exists()


def test_a_base_that_does_not_say_how_many_rows_it_has_is_refused(base, tmp_path):
    manifest, folder = base
    snapshot = next((tmp_path / "hub").rglob("config.json"))
    write_json(snapshot, {})
    with pytest.raises(DataError, match=r"config\.json has no vocab_size"):
        extend_base(folder, [token("<x>")], manifest)
