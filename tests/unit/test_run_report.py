"""The page of a run: what it says, of which figures, and that nothing in it can act."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_files import HOSTILE, facts_of, metrics, read, without, write_run

from finetune.errors import DataError
from finetune.export import speed
from finetune.io import write_text
from finetune.run_report.__main__ import write_report
from finetune.run_report.card import render_card
from finetune.run_report.facts import SPEED_FILE, RunFacts
from finetune.run_report.page import render_page
from finetune.run_report.verdict import verdicts
from finetune.run_report.version_page import Registered, describe

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The tags with their attributes, the text, and every element that is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        self.faults += self.open
        self.text = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += f" {data}" if data.strip() else " "


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return facts_of(tmp_path, metrics())


def shown(facts: RunFacts) -> Page:
    return Page(render_page(facts, data_page="../data/report/index.html"))


def test_the_page_is_whole_and_loads_nothing(facts: RunFacts) -> None:
    page = shown(facts)
    assert page.faults == []
    links = [value for _, given in page.tags for name, value in given.items() if name in ("href", "src", "action")]
    assert "../data/report/index.html" in links
    assert [link for link in links if link != "../data/report/index.html" and not str(link).startswith("#")] == []
    targets = {str(given["id"]) for _, given in page.tags if "id" in given}
    assert {str(link)[1:] for link in links if str(link).startswith("#")} <= targets
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not [name for _, given in page.tags for name in given if name.startswith("on")]
    assert "url(" not in render_page(facts, data_page="x")


def test_the_page_is_never_the_place_of_the_data_texts_code(facts: RunFacts) -> None:
    text = render_page(facts, data_page="x")
    assert "<script" not in text
    assert "<img" not in text
    assert "\x00" not in text
    # Prompt, tuned and F16 hold it: shown in full, its control character as a picture.
    assert shown(facts).text.count(HOSTILE.replace("\x00", "\u2400")) == 3


@pytest.mark.parametrize(
    "said",
    [
        "Perplexity of held-out answers, tuned / base × 0.4546 ✓ better: 95 % interval 0.4313 to 0.4781",
        "Prompts served as trained 100.0 % ✓ 72 of 72 test chats have the token ids of training",
        "Worst quantised perplexity / merged × 1.0016 ✓ Q4_K_M; every file is within its budget",
        "1,848 rows in = 1,700 kept + 120 dropped by a rule + 15 duplicates + 9 near-duplicates + 4 that could not",
        "1,500 train, 90 validation, 110 test rows; an epoch is 40,000 tokens, 32,100 of them trained",
        "Licences: CC-BY-4.0, MIT.",
        "tweets CC-BY-4.0 hub:some/tweets/* at cccccccccccc 1, 7 bytes a6f3c6e05359 1,000 900 800 10,000 25.0 %",
        "QLoRA (base in NF4 with double quantisation, computed in float32), rank 32, alpha 64",
        "a Llama of 1,574,144 parameters made from scratch",
        "learning rate 0.004, cosine, 5.0 % warm-up",
        "last validation loss 3.781 nats a token",
        "all test rows 2,080 tokens 65.65 → 29.85 × 0.4546 0.4313 to 0.4781 1.23 → 1.23 24.0 % → 36.1 %",
        "chat × 0.5000 (0.4000 to 0.6000)",
        "tweets 1,080 tokens 42.00 → 44.10 × 1.0500 not measured",
        "Labels: support figure base tuned F16 Q8_0 Q4_K_M answers 8 8 8 8 8 accuracy 25.0 % 50.0 % 50.0 % 25.0 % to",
        "Function calls: simple figure base tuned F16 Q8_0 Q4_K_M questions 400 400 not measured",
        "correct 0.0 % 0.0 % to 10.0 % 62.5 % 62.5 % to 72.5 % not measured not measured not measured",
        "Style: tweets figure held-out answers base tuned F16",
        "vocabulary distance, bits 0.432 0.432 0.432",
        "Memorisation figure base tuned F16 Q8_0 Q4_K_M answers 24 24",
        "Q8_0 5 F32, 15 Q8_0 1.64 MiB Pareto front × 1.0005 ✓ at most 1.01 0.0000793 ✓ at most 0.005 99.4 % ✓ at least",
        "1.23 1,234 / 98.7 212 MiB",
        "Speed and memory: on Test CPU, 2 thread(s).",
        "14 of 20 tensors changed; logits are within 0.0209 of base + adapter (at most 0.1 allowed).",
        "original the one that was exported 0.00123 98.8 % dequantized 0.000456 99.1 %",
        "chats with equal token ids 72 of 72 who builds the prompt Ollama's Go TEMPLATE",
        "answers stop at </s>",
        "processor Test CPU, 16 threads, 128 GiB GPU Test GPU, 139 GiB, 61.0 GiB held at most driver, CUDA 570.1, 13.0",
        "kernels attention varlen, refusing kernels that depend on timing micro-batch 8 packed rows started",
        "time 3,598 s speed 12,543 tokens/s energy of the GPUs 612 Wh resumed, steps skipped 3, 2 commit 1212",
        "GPU 0 power usage, W 613 690 701 speed, tokens/s 12,540 12,900 13,001",
        "git commit 1212121212121212121212121212121212121212",
        "adapter (models/adapter) " + "a" * 64,
        "git checkout 1212121212121212121212121212121212121212 make repro echo",
        "make lineage FILE=models/gguf/model-Q8_0.gguf",
        "lora.alpha 64",
    ],
)
def test_the_page_says(facts: RunFacts, said: str) -> None:
    assert said in shown(facts).text


def bare(root: Path) -> dict[str, Any]:
    """A run of one type without anything that may be missing."""
    numbers = metrics()
    for keys in (("evaluate", "tasks"), ("evaluate", "perplexity_ratio_interval"), ("merge", "compare")):
        without(numbers, *keys)
    del numbers["evaluate"]["by_source"]["chat"]["perplexity_ratio_interval"]
    numbers["quantize_gguf"]["types"] = {"Q8_0": numbers["quantize_gguf"]["types"]["Q8_0"]}
    for key in ("tasks", "sha256", "bits_per_byte", "tensor_types", "fallback_tensors"):
        del numbers["quantize_gguf"]["types"]["Q8_0"][key]
    for key in ("stops", "roles", "renderer", "tools"):
        del numbers["ollama_modelfile"][key]
    del numbers["train_qlora"]["validation_loss"]
    write_run(root, numbers)
    for name in (".cache/speed.json", ".cache/run_card.json", "data/quantization/samples.jsonl"):
        (root / name).unlink()
    lines = (root / "params.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if "{type: F16" not in line and "{type: Q4_K_M" not in line]
    write_text(root / "params.yaml", "".join(kept))
    return numbers


def test_what_was_not_measured_is_said_and_never_guessed(tmp_path: Path) -> None:
    bare(tmp_path)
    page = shown(read(tmp_path))
    assert page.faults == []
    assert "tuned / base × 0.4546 ? its 95 % interval was not measured" in page.text
    assert "not measured: evaluate in params.yaml asks for no task" in page.text
    assert "Original beside dequantised weights: not measured" in page.text
    assert "Speed and memory: not measured on this machine for these files" in page.text
    assert "The machine not measured: this adapter was not trained here, or its run card is gone" in page.text
    assert "last validation loss not measured" in page.text
    assert "Q8_0 not measured" in page.text
    assert "Q4_K_M" not in page.text.split("Every parameter")[0]
    card = render_card(read(tmp_path), "m")
    assert "## Tasks" in card


@pytest.mark.parametrize(
    "keys",
    [
        ("clean", "rows_in"),
        ("clean", "near_duplicates"),
        ("split", "splits", "test", "rows"),
        ("train_qlora", "steps"),
        ("evaluate", "perplexity_ratio"),
        ("evaluate", "tuned", "perplexity"),
        ("evaluate", "by_source", "chat", "base", "perplexity"),
        ("merge", "max_logit_difference"),
        ("quantize_gguf", "types", "Q8_0", "mean_kl"),
        ("quantize_gguf", "types", "Q8_0", "size_bytes"),
        ("ollama_modelfile", "parity"),
    ],
    ids=".".join,
)
def test_a_missing_figure_names_its_file_and_stage(tmp_path: Path, keys: tuple[str, ...]) -> None:
    facts = facts_of(tmp_path, without(metrics(), *keys))
    name, place = r"\.".join(keys[1:]), rf"metrics/{keys[0]}\.json(.|\n)*--single-item {keys[0]}"
    with pytest.raises(DataError, match=rf"{name} is missing(.|\n)*{place}"):
        render_page(facts, data_page="x")


def test_a_figure_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    numbers = metrics()
    numbers["ollama_modelfile"]["parity"] = "all"
    with pytest.raises(DataError, match=r"parity is 'all', not a number(.|\n)*single-item ollama_modelfile"):
        render_page(facts_of(tmp_path, numbers), data_page="x")


def test_files_of_other_types_than_params_asks_for_are_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, without(metrics(), "quantize_gguf", "types", "F16"))
    with pytest.raises(DataError, match=r"measured are the types Q4_K_M, Q8_0, params.yaml asks for F16, Q4_K_M, Q8_0"):
        read(tmp_path)


def test_a_plot_without_the_pareto_column_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, metrics())
    write_text(tmp_path / "plots/quantization.csv", "type\nF16\n")
    with pytest.raises(DataError, match=r"column pareto is missing(.|\n)*single-item quantize_gguf"):
        read(tmp_path)


def test_the_speed_of_a_file_that_was_replaced_is_not_shown(facts: RunFacts) -> None:
    # The fixture's Q4_K_M was measured with another SHA-256.
    assert sorted(facts.speed) == ["F16", "Q8_0"]
    row = shown(facts).text.split("1.03 MiB")[1].split("Speed and memory")[0]
    assert row.endswith("1.23 not measured not measured ")
    assert speed.SPEED_FILE == SPEED_FILE


@pytest.mark.parametrize(
    ("low", "high", "text", "kind"),
    [
        (0.4, 0.6, "better: 95 % interval 0.4000 to 0.6000", "good"),
        (0.9, 1.0, "no clear change: 95 % interval 0.9000 to 1.0000", "open"),
        (1.1, 1.2, "worse: 95 % interval 1.1000 to 1.2000", "bad"),
    ],
)
def test_better_means_an_interval_below_one(tmp_path: Path, low: float, high: float, text: str, kind: str) -> None:
    numbers = metrics()
    numbers["evaluate"]["perplexity_ratio_interval"] = {"low": low, "high": high}
    first = verdicts(facts_of(tmp_path, numbers))[0]
    assert (first.text, first.kind) == (text, kind)


def test_a_broken_budget_and_a_chat_served_otherwise_are_bad(tmp_path: Path) -> None:
    numbers = metrics()
    numbers["quantize_gguf"]["types"]["Q8_0"] |= {"perplexity_ratio": 1.02, "mean_kl": 0.0061, "top1_agreement": 0.9}
    numbers["ollama_modelfile"]["parity"] = 71 / 72
    facts = facts_of(tmp_path, numbers)
    served, worst = verdicts(facts)[1:]
    assert (served.figure, served.text, served.kind) == (
        "98.6\u00a0%",
        "71 of 72 test chats have the token ids of training",
        "bad",
    )
    assert (worst.figure, worst.kind) == ("×\u00a01.0200", "bad")
    assert worst.text == (
        "Q8_0; over budget: Q8_0: perplexity ×\u00a01.0200, at most 1.01; Q8_0: KL 0.00610, at most 0.005; "
        "Q8_0: same first choice 90.0\u00a0%, at least 97.0\u00a0%"
    )
    assert 'class="bad"' in render_page(facts, data_page="x")


def test_files_that_no_commit_holds_get_no_command(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, metrics(), **{"git.dirty": "true"})
    for text in (shown(facts).text, describe(facts, "m", Registered("1", "upload", ""))):
        assert "The files differed from commit 1212121212121212121212121212121212121212" in text
        assert "git checkout" not in text
    assert "<code>make repro</code>" in render_page(facts, data_page="x")
    assert "belong to no git commit" in shown(read(tmp_path, **{"git.commit": "none", "git.dirty": "none"})).text


def test_make_report_writes_the_same_page_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write_run(tmp_path, metrics())
    for name in ("base", "merged"):
        write_text(tmp_path / "models" / name / "model.bin", name)
    path = write_report(tmp_path)
    first = path.read_bytes()
    assert path == tmp_path / "report/index.html"
    assert b'href="../data/report/index.html"' in first
    assert write_report(tmp_path).read_bytes() == first


def test_a_run_that_is_not_there_says_what_makes_it(tmp_path: Path) -> None:
    write_run(tmp_path, metrics())
    with pytest.raises(DataError, match=r"missing(.|\n)*models/(base|merged)(.|\n)*dvc repro"):
        write_report(tmp_path)
