from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import ParamsError
from finetune.params import load_params

SMOKE = Path(__file__).resolve().parents[2] / "recipes/smoke/params.yaml"


def changed(tmp_path: Path, *replacements: tuple[str, str]) -> Path:
    text = SMOKE.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_faults_are_reported_together_by_key(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        ("seed: 42", "seed: forty-two"),
        ("  normalization: NFC", "  normalization: NFC\n  colour: blue"),
        ("max_quarantined_share: 0.05", "max_quarantined_share: 1.5"),
        ("    rank: 32", "    rank: 0"),
        ("  max_new_tokens: 48\n", ""),
    )
    with pytest.raises(ParamsError, match=r"5 fault\(s\)") as caught:
        load_params(path)
    message = str(caught.value)
    for key in (
        "seed",
        "clean.colour",
        "clean.max_quarantined_share",
        "train_qlora.lora.rank",
        "evaluate.max_new_tokens",
    ):
        assert f"  - {key}: " in message
    assert "got 'forty-two'" in message
    assert "got 1.5" in message
    assert "make recipe NAME=smoke" in message


def test_scientific_notation_is_a_number_as_for_dvc(tmp_path: Path) -> None:
    assert (
        load_params(
            changed(tmp_path, ("learning_rate: 4.0e-3\n  scheduler", "learning_rate: 2e-06\n  scheduler"))
        ).train_qlora.learning_rate
        == 2e-06
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pack_tokens: 512", "pack_tokens: 256", r"pack_tokens \(256\) must be at least tokenize\.max_tokens \(512\)"),
        ("quantization: Q8_0", "quantization: Q6_K", r"ollama_modelfile\.quantization \(Q6_K\) must be one of"),
        ("test_share: 0.15", "test_share: 0.9", r"validation_share \(0\.1\) \+ test_share \(0\.9\) must be below 1"),
        ("hidden_size: 256", "hidden_size: 200", r"base\.scratch\.hidden_size: .*got 200"),
        ("kind: scratch}", "kind: hub, repo_id: a/b, revision: main}", r"revision: .*got 'main'"),
        ('pad_token: "<pad>"', 'pad_token: "</s>"', "role markers and special tokens must all differ"),
        ("name: chat_en", "name: chat_fr", "source names must differ, repeated: chat_fr"),
        ("type: F16", "type: Q8_0", "types must differ, repeated: Q8_0"),
        (
            "num_ctx: 1024",
            "num_ctx: 2048",
            r"num_ctx \(2048\) must be at most base\.scratch\.max_position_tokens \(1024\)",
        ),
        (
            "pack_tokens: 512",
            "pack_tokens: 4096",
            r"split\.pack_tokens \(4096\) must be at most base\.scratch\.max_pos",
        ),
        (
            "  max_tokens: 512",
            "  max_tokens: 1025",
            r"tokenize\.max_tokens \(1025\) must be at most base\.scratch\.max_pos",
        ),
        (
            "row_tokens: 256",
            "row_tokens: 1025",
            r"row_tokens \(1025\) must be at most base\.scratch\.max_position_tokens",
        ),
        ("warmup_share: 0.05", "warmup_share: 1.0", r"train_qlora\.warmup_share: .*less than 1"),
        ("max_gradient_norm: 1.0", "max_gradient_norm: .inf", r"train_qlora\.max_gradient_norm: .*finite number"),
        ("style_sources: [tweets]", "style_sources: [posts]", r"evaluate\.style_sources names posts, which no train"),
        ("labels: {}", "labels: {posts: [yes, no]}", r"evaluate\.labels names posts, which no training source"),
        ("labels: {}", "labels: {tweets: [one]}", r"evaluate\.labels\.tweets: .*at least 2"),
        (
            "{name: workshop_irrelevance,",
            "{name: workshop_simple,",
            r"names of sets must differ, repeated: workshop_simple",
        ),
        ("max_perplexity_ratio: 1.15", "max_perplexity_ratio: .nan", r"max_perplexity_ratio: .*finite number"),
        ("model_name: finetune-smoke", "model_name: l'atelier", r"register\.model_name: .*pattern"),
        ("model_name: finetune-smoke", "model_name: Smoke", r"register\.model_name: .*pattern"),
        ("experiment: finetune", 'experiment: "fine\'tune"', r"register\.experiment: .*pattern"),
    ],
)
def test_values_that_cannot_work_together_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        load_params(changed(tmp_path, (old, new)))


def test_a_new_vocabulary_on_a_pre_trained_model_is_refused(tmp_path: Path) -> None:
    scratch = SMOKE.read_text(encoding="utf-8").partition("\n  scratch:")[2].partition("\n\n")[0]
    path = changed(
        tmp_path,
        ("kind: scratch}", f"kind: hub, repo_id: a/b, revision: {'a' * 40}}}"),
        (f"\n  scratch:{scratch}", "\n  scratch: null"),
    )
    with pytest.raises(ParamsError, match=r"tokenizer\.strategy must be keep or extend for a hub base") as caught:
        load_params(path)
    assert "1 fault(s)" in str(caught.value)
    assert "base.scratch" not in str(caught.value)


def test_a_missing_file_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="make recipe NAME=smoke"):
        load_params(tmp_path / "params.yaml")


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("recipe: [smoke\nseed: 1\n", encoding="utf-8")
    with pytest.raises(ParamsError, match="line 2"):
        load_params(path)


def test_params_yaml_is_the_smoke_recipe() -> None:
    assert (SMOKE.parents[2] / "params.yaml").read_bytes() == SMOKE.read_bytes()
