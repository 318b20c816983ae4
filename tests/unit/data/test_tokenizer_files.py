from pathlib import Path

import pytest
from huggingface_hub import constants
from test_bpe import PARAMS, TEXTS
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer

from finetune.data.fetching.hub import Repo
from finetune.data.vocabulary.bpe import train
from finetune.data.vocabulary.tokenizer_files import (
    choose_pad_token,
    copy_base_tokenizer,
    install_templates,
    load_chat,
    special_ids,
    write_trained,
)
from finetune.errors import DataError
from finetune.io import read_json, write_json, write_text

SMOKE = Path(__file__).parents[3] / "recipes" / "smoke" / "chat_template.jinja"


@pytest.fixture
def folder(tmp_path):
    write_trained(train(TEXTS, PARAMS), PARAMS, 512, tmp_path)
    install_templates(SMOKE, tmp_path)
    return tmp_path


def test_transformers_loads_the_folder_with_its_special_tokens_and_serving_template(folder):
    loaded = AutoTokenizer.from_pretrained(str(folder))
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)
    assert loaded.model_max_length == 512
    assert loaded("le vélo")["input_ids"] == load_chat(folder).tokenizer.encode("le vélo").ids
    served = loaded.apply_chat_template(
        [{"role": "user", "content": "le vélo"}], add_generation_prompt=True, tokenize=False
    )
    assert served == "<s><|user|>\nle vélo\n<|assistant|>\n"


def test_a_chat_is_read_back_and_adds_no_token_by_itself(folder):
    chat = load_chat(folder)
    assert (chat.ids.bos, chat.ids.eos, chat.ids.pad) == (1, 2, 0)
    assert chat.ids.vocab_size == chat.tokenizer.get_vocab_size()
    assert chat.special_texts == ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
    assert chat.tokenizer.encode("le", add_special_tokens=True).tokens == ["le"]


def test_the_unknown_token_is_named_where_there_is_one(tmp_path):
    params = PARAMS.model_copy(update={"unk_token": "<unk>"})
    write_trained(train(TEXTS, params), params, 512, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (loaded.unk_token, loaded.unk_token_id) == ("<unk>", 3)


def test_pad_that_is_eos_or_missing_is_refused(folder):
    chat = load_chat(folder)
    for tokens in ({"eos_token": "</s>", "pad_token": "</s>"}, {"eos_token": "</s>"}):
        with pytest.raises(DataError, match="must be two different tokens of the vocabulary"):
            special_ids(chat.tokenizer, tokens, "models/tokenizer")


def test_a_base_without_pad_and_unk_is_refused_with_its_tokens_named(tmp_path, monkeypatch):
    # The layout of the Hub cache: fetch leaves a base model in it.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = Repo("team/base", "model", "0" * 40)
    snapshot = tmp_path / "hub" / "models--team--base" / "snapshots" / repo.revision
    tokenizer = Tokenizer(BPE())
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|reserved_0|>"])
    write_text(snapshot / "tokenizer.json", tokenizer.to_str())
    write_json(snapshot / "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    files = [{"path": "tokenizer.json"}, {"path": "tokenizer_config.json"}]
    manifest = {"repo_id": repo.repo_id, "revision": repo.revision, "files": files}
    (tmp_path / "out").mkdir()
    copy_base_tokenizer(manifest, tmp_path / "out")
    with pytest.raises(DataError, match=r"its 3 added tokens are: <\|begin\|>, <\|end\|>, <\|reserved_0\|>") as caught:
        choose_pad_token(tmp_path / "out")
    assert "set fetch.base_model to a revision that has a pad_token or an unk_token" in caught.value.remedy


def test_a_base_that_names_its_end_by_id_alone_gets_it_from_the_models_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = Repo("team/base", "model", "0" * 40)
    snapshot = tmp_path / "hub" / "models--team--base" / "snapshots" / repo.revision
    tokenizer = Tokenizer(BPE({"a": 0}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    write_text(snapshot / "tokenizer.json", tokenizer.to_str())
    write_json(snapshot / "tokenizer_config.json", {"model_max_length": 1024})
    # GPT-2's configuration gives both the same id; an ordinary token (0) is no special one, whatever a file says.
    write_json(snapshot / "config.json", {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 2})
    files = [{"path": "tokenizer.json"}, {"path": "tokenizer_config.json"}, {"path": "config.json"}]
    (tmp_path / "out").mkdir()
    copy_base_tokenizer({"repo_id": repo.repo_id, "revision": repo.revision, "files": files}, tmp_path / "out")
    assert read_json(tmp_path / "out/tokenizer_config.json") == {
        "eos_token": "<|endoftext|>",
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_a_template_that_says_nothing_about_training_or_is_missing_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="file is missing"):
        install_templates(tmp_path / "absent.jinja", folder)
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"no \{% generation %\} tag"):
        install_templates(plain, folder)


def test_an_answer_that_is_trained_behind_another_prompt_than_is_served_is_refused(tmp_path):
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    sound = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:\n' }}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.role + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:\n' }}{% endif %}"
    )
    file = tmp_path / "t.jinja"
    file.write_text(sound, encoding="utf-8")
    install_templates(file, tmp_path)
    for other in ("{{ 'A:' }}{% endif %}", "{% endif %}"):
        file.write_text(sound.replace("{{ 'A:\n' }}{% endif %}", other), encoding="utf-8")
        with pytest.raises(
            DataError, match=r"an answer is trained after '<s>usera.*A:\\n', and served after '<s>usera"
        ):
            install_templates(file, tmp_path)
