"""Libraries, device, memory, time and disk: what each check says of which facts."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from finetune.doctor.accelerator import (
    Accelerators,
    Gpu,
    accelerators,
    bitsandbytes_result,
    build_result,
    gpus_result,
    hardware_result,
    runs_on,
)
from finetune.doctor.budget import (
    TrainingPlan,
    measured_speed,
    memory_result,
    merge_result,
    plan,
    planned_attention,
    steps_of,
    time_result,
    unknown_memory,
)
from finetune.doctor.libraries import check_libraries, installed, pins_result, python_result, read_pins
from finetune.doctor.result import GIB, Result, as_json, fault, ok, table, warning, worst
from finetune.errors import DataError, DeviceError
from finetune.params import Params
from finetune.training.batch_plan import BatchPlan
from finetune.training.memory_model import MemoryEstimate, StillBytes

ROOT = Path(__file__).resolve().parents[3]
H200 = Gpu("NVIDIA H200", 139 * GIB, (9, 0), kernels=True)
ESTIMATE = MemoryEstimate(*([0] * 3), adapter=GIB, gradients=GIB, optimizer=2 * GIB, activations=GIB, head=0,
                          attention_mask=0, workspace=0, context=0)  # fmt: skip
STILL = StillBytes(3 * GIB, 0, 2 * GIB, 0, 0, 0, layer=GIB)


def test_the_table_and_the_json_say_the_same() -> None:
    results = [ok("a", "one\ntwo"), warning("long name", "three", "do this"), fault("b", "four", "do that\nor that")]
    assert table(results) == (
        "ok       a          one\n"
        "                    two\n"
        "WARNING  long name  three\n"
        "                    remedy: do this\n"
        "FAULT    b          four\n"
        "                    remedy: do that\n"
        "                            or that\n"
        "3 checks: 1 faults, 1 warnings\n"
    )
    assert as_json(results)["verdict"] == "fault"
    assert as_json(results)["checks"][2] == {
        "check": "b", "found": "four", "verdict": "fault", "remedy": "do that\nor that"
    }  # fmt: skip
    assert [worst(results[:2]), worst(results[:1])] == ["warning", "ok"]


def test_pins_are_read_and_compared(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("# a comment with ==\ntorch==2.13.0   # why\n\nnot-there==1.0  # why\n")
    pins = read_pins(tmp_path, ("train", "missing"))
    assert pins == {"torch": "2.13.0", "not-there": "1.0"}
    # The CPU build calls itself 2.13.0+cpu.
    assert installed(pins) == {"torch": version("torch").split("+")[0], "not-there": None}
    found = {"torch": "2.12.0", "not-there": None}
    shown = "torch 2.12.0 (pinned: 2.13.0); not-there is missing (pinned: 1.0)"
    assert pins_result("libraries", pins, found, needed=True) == Result("libraries", shown, "fault", "make setup")
    assert pins_result("tests", pins, found, needed=False).verdict == "warning"
    assert pins_result("libraries", pins, pins, needed=True) == ok("libraries", "2 packages as pinned")
    assert pins_result("libraries", {}, {}, needed=True).verdict == "fault"


def test_this_environment_is_the_pinned_one() -> None:
    assert [result.verdict for result in check_libraries(ROOT, (3, 11))] == ["ok", "ok", "ok"]
    assert python_result((3, 10)).verdict == "fault"
    assert python_result((3, 12)) == ok("python", "3.12")


@pytest.mark.parametrize(
    ("cuda", "driver", "verdict", "found"),
    [
        (None, None, "ok", "torch 2.13.0, CPU build"),
        (None, "580.1", "warning", "torch 2.13.0, CPU build, beside NVIDIA driver 580.1: no GPU is used"),
        (
            "13.0",
            None,
            "warning",
            "torch 2.13.0, built for CUDA 13.0, and nvidia-smi shows no driver: training runs on",
        ),
        ("13.0", "550.54", "fault", "torch 2.13.0, built for CUDA 13.0, driver 550.54: CUDA 13.0 needs 580 or newer"),
        ("13.0", "580.65", "ok", "torch 2.13.0, built for CUDA 13.0, driver 580.65"),
        ("12.8", "525.60", "ok", "torch 2.13.0, built for CUDA 12.8, driver 525.60"),
        ("14.0", "700.1", "warning", "torch 2.13.0, built for CUDA 14.0, driver 700.1: which driver this CUDA needs"),
    ],
)
def test_the_driver_must_know_the_cuda_of_the_build(
    cuda: str | None, driver: str | None, verdict: str, found: str
) -> None:
    result = build_result(Accelerators("2.13.0", cuda, driver, ()))
    assert (result.verdict, result.found[: len(found)]) == (verdict, found)


def test_gpus_are_shown_and_must_be_enough_and_of_the_build() -> None:
    shown = "NVIDIA H200, 139.0 GiB, compute capability 9.0"
    assert gpus_result(Accelerators("2", "13.0", "580", (H200,)), 1) == ok("GPUs", shown)
    assert gpus_result(Accelerators("2", None, None, ()), 1) == ok("GPUs", "none: training runs on the CPU")
    few = gpus_result(Accelerators("2", "13.0", "580", (H200,)), 4)
    assert (few.verdict, few.remedy) == ("fault", "set train_qlora.distribution.processes: 1")
    old = gpus_result(Accelerators("2", "13.0", "580", (Gpu("Tesla P100", 16 * GIB, (6, 0), kernels=False),)), 1)
    assert (old.verdict, old.found) == (
        "fault",
        "Tesla P100 has compute capability 6.0, and torch's build no code for it",
    )


def test_which_build_of_torch_runs_on_which_gpu() -> None:
    built = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
    assert [runs_on(capability, built) for capability in ((6, 0), (7, 5), (8, 9), (9, 0), (10, 3), (11, 0))] == [
        False, True, True, True, True, False
    ]  # fmt: skip
    assert runs_on((13, 0), [*built, "compute_120"])
    assert runs_on((10, 3), ["sm_100a"])


def test_this_machine_is_seen() -> None:
    found = accelerators()
    assert found.torch.startswith("2.13.0")
    assert bool(found.gpus) <= (found.cuda is not None)


def test_settings_that_the_device_refuses_are_a_fault(smoke: Params) -> None:
    settings = smoke.train_qlora.model_copy(update={"optimizer": "paged_adamw_8bit", "compute_dtype": "float32"})
    assert hardware_result(smoke.train_qlora).verdict == "ok"
    refused = hardware_result(settings)
    if not accelerators().gpus:
        assert (refused.verdict, refused.found.partition(":")[0]) == ("fault", "train_qlora.optimizer")


def test_bitsandbytes_quantises_here(smoke: Params) -> None:
    assert bitsandbytes_result(smoke.train_qlora).verdict == "ok"
    plain = smoke.train_qlora.quantization.model_copy(update={"format": "none"})
    settings = smoke.train_qlora.model_copy(update={"quantization": plain})
    assert bitsandbytes_result(settings).found.startswith("not needed")
    wrong = smoke.train_qlora.quantization.model_copy(update={"format": "nf5"})
    broken = bitsandbytes_result(smoke.train_qlora.model_copy(update={"quantization": wrong}))
    assert broken.verdict == "fault"


def test_the_plan_is_shown_term_by_term() -> None:
    planned = TrainingPlan(BatchPlan(4, 8, "selective", ESTIMATE), STILL, 9000)
    assert memory_result(planned, 24 * GIB, "a card of 24 GiB") == ok(
        "memory of training",
        "5.0 GiB at the fullest moment, of 24.0 GiB (a card of 24 GiB): 4 rows x 8 a step, gradient checkpointing "
        "selective\n"
        "  1.00 GiB  adapter\n  1.00 GiB  gradients\n  2.00 GiB  optimizer\n  1.00 GiB  activations\n"
        "  5.00 GiB  total\n"
        "a packed row may have 9,000 tokens at most, with full checkpointing",
    )
    assert memory_result(planned, 4 * GIB, "a card of 4 GiB").verdict == "fault"


def test_on_a_cpu_the_weights_must_fit() -> None:
    planned = TrainingPlan(BatchPlan(1, 8, "none", None), STILL, None)
    assert memory_result(planned, 8 * GIB, "this machine, free") == ok(
        "memory of training",
        "5.0 GiB without activations, of 8.0 GiB (this machine, free): 1 rows x 8 a step, gradient checkpointing none\n"
        "  3.00 GiB  four bit weights\n  2.00 GiB  other weights",
    )
    assert memory_result(planned, 4 * GIB, "this machine, free").verdict == "fault"


def test_the_plan_of_a_base_on_a_card_and_on_a_cpu(
    smoke: Params, dolores: Params, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "models/base")
    on_cpu = plan(tmp_path, smoke, None)
    assert (on_cpu.chosen.micro_batch_rows, on_cpu.chosen.estimate, on_cpu.longest_tokens) == (1, None, None)
    on_card = plan(tmp_path, smoke, 24 * GIB)
    assert on_card.chosen.estimate is not None
    # 32 values a row and a column of the seven layers of one Llama layer, in float32.
    sides = (64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64)
    assert on_card.still.adapter == on_card.chosen.estimate.adapter == 32 * sum(sides) * 4
    assert (on_card.longest_tokens or 0) > 512
    assert planned_attention(tmp_path / "models/base", smoke.train_qlora, on_card=True) == "sdpa"
    automatic = dolores.train_qlora.model_copy(update={"attention": "auto"})
    assert planned_attention(tmp_path / "models/base", automatic, on_card=False) == "sdpa"
    if not accelerators().gpus:
        assert planned_attention(tmp_path / "models/base", automatic, on_card=True) == "finetune_varlen"
    with pytest.raises(DeviceError):
        plan(tmp_path, smoke, GIB // 2)


def test_no_plan_is_a_warning_before_the_base_is_made_and_a_fault_where_nothing_fits(
    smoke: Params, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="the base is not made"):
        plan(tmp_path, smoke, None)
    early = unknown_memory(DataError("the base is not made", "models/base", "dvc repro base"))
    assert early == warning("memory of training", "not known yet: the base is not made (models/base)", "dvc repro base")
    assert unknown_memory(DeviceError("30 GiB, has 8", "train_qlora", "a larger card")) == fault(
        "memory of training", "train_qlora: 30 GiB, has 8", "a larger card"
    )


def test_the_comparison_after_training_must_fit_the_memory(dolores: Params, smoke: Params) -> None:
    assert merge_result(dolores, 8_000_000_000, 64 * GIB, on_card=True) == ok(
        "memory of merge", "merge.compare_dtype holds 22.4 GiB of the 64.0 GiB that are free now"
    )
    small = merge_result(dolores, 8_000_000_000, 16 * GIB, on_card=False)
    assert (small.verdict, small.found) == ("fault", "quantize_gguf holds 29.8 GiB of the 16.0 GiB that are free now")
    wide = merge_result(smoke, 8_000_000_000, 16 * GIB, on_card=True)
    assert (wide.remedy or "").startswith("set merge.compare_dtype: bfloat16")
    assert merge_result(smoke, None, GIB, on_card=True).found == "not known: the base's size is not"


def test_time_is_said_only_where_it_was_measured_on_such_a_machine(smoke: Params) -> None:
    metrics = {"packed": {"rows": 73}, "splits": {"train": {"tokens": 36840}}}
    settings = smoke.train_qlora.model_copy(update={"batch_rows": 4})
    assert steps_of(metrics, settings) == (95, 184_200)
    assert time_result((95, 184_200), None).found == "95 steps, 184,200 tokens; speed of this machine: not measured"
    assert (
        time_result((95, 184_200), 500.0).found
        == "95 steps, 184,200 tokens: about 6 min at 500 tokens/s, the last run's"
    )
    assert time_result((95, 18_420_000), 500.0).found.endswith("about 10.2 h at 500 tokens/s, the last run's")
    assert time_result(None, 500.0).found.startswith("not known yet")
    card = {"hardware": {"gpus": [{"name": "NVIDIA H200"}], "cpu": {"model": "Xeon"}}, "tokens_per_s": 9000}
    assert measured_speed(card, Accelerators("2", "13.0", "580", (H200,)), "Xeon") == 9000.0
    assert measured_speed(card, Accelerators("2", "13.0", "580", (H200, H200)), "Xeon") is None
    assert measured_speed(card, Accelerators("2", "13.0", "580", (H200,)), "EPYC") is None
    assert measured_speed({}, Accelerators("2", None, None, ()), "Xeon") is None
