"""What a run writes to which disk, and whether it is free there."""

from __future__ import annotations

from pathlib import Path

from finetune.doctor.disk import (
    GGUF_BITS,
    Disk,
    Need,
    Size,
    disk_results,
    read_disk,
    run_needs,
    scratch_parameters,
    size_of_base,
    stored_times,
)
from finetune.doctor.result import GIB, ok
from finetune.export.gguf import BITS_PER_WEIGHT
from finetune.params import Params

ROOT = Path(__file__).resolve().parents[3]


def test_bits_of_gguf_types_are_those_that_the_stage_counts_with() -> None:
    assert GGUF_BITS == BITS_PER_WEIGHT


def test_the_size_of_a_base_and_how_it_is_known(smoke: Params, dolores: Params) -> None:
    # metrics/base.json of the smoke recipe.
    assert smoke.base.scratch is not None
    assert scratch_parameters(smoke.base.scratch, 1536) == 1_574_144
    assert size_of_base(smoke, None) == Size(1_574_144, "base.scratch")
    assert size_of_base(dolores, None) == Size(8_030_261_248, "its page on the Hub")
    assert size_of_base(named(dolores, "a/Other-3B-it"), None) == Size(3_000_000_000, "its name, estimated")
    assert size_of_base(named(dolores, "a/Other-3B-it"), 5_000_000) == Size(
        2_500_000, "its files in the Hub cache, taken as 16 bit"
    )
    assert size_of_base(named(dolores, "a/SmolLM2-135M"), None).parameters == 135_000_000
    assert size_of_base(named(dolores, "a/phi4"), None) == Size(None, "neither its files nor its name say it")


def named(params: Params, repo_id: str) -> Params:
    base = params.fetch.base_model.model_copy(update={"repo_id": repo_id})
    return params.model_copy(update={"fetch": params.fetch.model_copy(update={"base_model": base})})


def test_what_a_run_of_an_8b_model_writes(dolores: Params) -> None:
    known = {"missing_base_bytes": 16_000, "trained_bytes": 100, "optimizer_bytes": 200, "uploads": True}
    needs = run_needs(dolores, Size(1000, ""), copies=2, **known)  # type: ignore[arg-type]
    assert needs == [
        Need("base model to download", 16_000, "HF_HOME"),
        Need("6 checkpoints", 1800, "repository"),
        Need("adapter", 200, "repository"),
        Need("merged model", 4000, "repository"),
        Need("whole GGUF, for the time of quantisation", 2000, "repository"),
        Need("GGUF files (F16, Q8_0, Q4_K_M)", 7350, "repository"),
        Need("temporary files", 256 << 20, "TMPDIR"),
    ]
    unknown = run_needs(
        dolores, Size(None, ""), missing_base_bytes=None, trained_bytes=None, optimizer_bytes=1, copies=1, uploads=False
    )
    assert [need.size_bytes for need in unknown] == [None, None, None, None, None, None, 256 << 20]


def test_a_scratch_base_is_an_out_and_its_model_is_uploaded(smoke: Params) -> None:
    needs = run_needs(
        smoke, Size(1000, ""), missing_base_bytes=0, trained_bytes=1, optimizer_bytes=2, copies=1, uploads=True
    )
    assert needs[0] == Need("base model", 2000, "repository")
    assert needs[-1] == Need("upload into mlartifacts", 2000, "repository")


def test_needs_are_summed_by_disk() -> None:
    needs = [Need("a", 6 * GIB, "repository"), Need("b", 3 * GIB, "HF_HOME"), Need("c", None, "HF_HOME")]
    together = disk_results(needs, {"repository": Disk(1, 20 * GIB), "HF_HOME": Disk(1, 20 * GIB)})
    assert together == [
        ok(
            "disk of repository, HF_HOME",
            "20.0 GiB free, a whole run writes at least 9.0 GiB\n6.0 GiB  a\n3.0 GiB  b\nnot known: c",
        )
    ]
    apart = disk_results(needs, {"repository": Disk(1, 5 * GIB), "HF_HOME": Disk(2, 20 * GIB)})
    assert [(result.check, result.verdict) for result in apart] == [
        ("disk of repository", "fault"), ("disk of HF_HOME", "ok")
    ]  # fmt: skip
    assert (apart[0].remedy or "").startswith("free 1.0 GiB there")
    assert disk_results(needs[:1], {"repository": Disk(1, int(6.5 * GIB))})[0].verdict == "warning"


def test_outs_are_stored_twice_only_where_dvc_copies() -> None:
    assert stored_times((ROOT / ".dvc/config").read_text()) == 1
    assert stored_times('[cache]\n    type = "reflink,copy"\n') == 2
    assert stored_times("") == 2


def test_the_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    assert read_disk(tmp_path / "a/b").number == read_disk(tmp_path).number
