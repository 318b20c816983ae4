"""torch's build, the driver, the GPUs, bitsandbytes -> whether they can do what train_qlora asks for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from finetune.doctor.result import Result, fault, gib, ok, warning
from finetune.errors import DeviceError
from finetune.training_sections import TrainQlora

# The first driver of each major CUDA release:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
FIRST_DRIVER = {11: 450, 12: 525, 13: 580}
NVIDIA_SMI_TIMEOUT_S = 10


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees. `kernels`: whether torch's build holds code that runs on it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    kernels: bool


@dataclass(frozen=True)
class Accelerators:
    """`cuda`: the CUDA release that torch is built for, None for the CPU build. `driver`: as nvidia-smi says."""

    torch: str
    cuda: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]


def accelerators() -> Accelerators:
    """Look at torch and at nvidia-smi; imports torch."""
    import torch

    names = torch.cuda.get_arch_list() if torch.cuda.is_available() else []
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = (found.major, found.minor)
        gpus.append(Gpu(found.name, found.total_memory, capability, runs_on(capability, names)))
    return Accelerators(torch.__version__, torch.version.cuda, nvidia_driver(), tuple(gpus))


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether one of torch's builds (`sm_80`, `compute_90`) runs: the same major and no newer, or PTX no newer."""
    for kind, _, digits in (name.partition("_") for name in architectures):
        number = digits.rstrip("af")
        built = (int(number[:-1]), int(number[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def nvidia_driver() -> str | None:
    """The driver's version, or None where nvidia-smi is missing or finds no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def build_result(found: Accelerators) -> Result:
    """Whether torch's build and the driver go together."""
    build = f"torch {found.torch}, {f'built for CUDA {found.cuda}' if found.cuda else 'CPU build'}"
    if found.cuda is None:
        if found.driver is None:
            return ok("torch and driver", build)
        remedy = "make clean-tools && make setup"
        return warning("torch and driver", f"{build}, beside NVIDIA driver {found.driver}: no GPU is used", remedy)
    if found.driver is None:
        remedy = "install the NVIDIA driver (in a container: run it with --gpus all), or: make setup TORCH=cpu"
        return warning("torch and driver", f"{build}, and nvidia-smi shows no driver: training runs on the CPU", remedy)
    first = FIRST_DRIVER.get(int(found.cuda.partition(".")[0]))
    build = f"{build}, driver {found.driver}"
    if first is None:
        remedy = "see https://docs.nvidia.com/deploy/cuda-compatibility/"
        return warning("torch and driver", f"{build}: which driver this CUDA needs is not known here", remedy)
    if int(found.driver.partition(".")[0]) < first:
        remedy = f"install NVIDIA driver {first} or newer, then start the machine again"
        return fault("torch and driver", f"{build}: CUDA {found.cuda} needs {first} or newer", remedy)
    return ok("torch and driver", build)


def gpus_result(found: Accelerators, processes: int) -> Result:
    """The GPUs; one that torch's build has no code for is a fault, and fewer than processes are."""
    shown = [f"{gpu.name}, {gib(gpu.memory_bytes)}, compute capability {_dotted(gpu)}" for gpu in found.gpus]
    if useless := [gpu for gpu in found.gpus if not gpu.kernels]:
        what = f"{useless[0].name} has compute capability {_dotted(useless[0])}, and torch's build no code for it"
        return fault("GPUs", what, "CUDA_VISIBLE_DEVICES= make repro (on the CPU), or use a newer GPU")
    if 0 < len(found.gpus) < processes:
        remedy = f"set train_qlora.distribution.processes: {len(found.gpus)}"
        return fault("GPUs", f"{len(found.gpus)} for {processes} processes: {'; '.join(shown)}", remedy)
    return ok("GPUs", "\n".join(shown) or "none: training runs on the CPU")


def hardware_result(settings: TrainQlora) -> Result:
    """Whether the device of the training honours train_qlora, as the training itself will ask."""
    import torch

    from finetune.training.device import check_hardware

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        check_hardware(settings, device)
    except DeviceError as refusal:
        return fault("train_qlora on this device", f"{refusal.where}: {refusal.what}", refusal.remedy)
    return ok("train_qlora on this device", f"{settings.compute_dtype} on {device.type}")


def bitsandbytes_result(settings: TrainQlora) -> Result:
    """Whether bitsandbytes quantises a few numbers on the training's device; imports it only where it is needed."""
    needed = settings.quantization.format != "none" or settings.optimizer.endswith(("8bit", "32bit"))
    if not needed:
        return ok("bitsandbytes", "not needed: 16 or 32-bit weights and torch's own optimizer")
    try:
        shown = _quantize_a_little(settings.quantization.format)
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        what = f"it cannot be used: {(str(error) or type(error).__name__).splitlines()[0]}"
        return fault("bitsandbytes", what, "make setup, and where a CUDA library is missing: python -m bitsandbytes")
    return ok("bitsandbytes", shown)


def _quantize_a_little(name: str) -> str:
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "nf4" if name == "none" else name
    values = torch.linspace(-1, 1, 128, device=device)
    blocks, state = functional.quantize_4bit(values, blocksize=64, quant_type=kind)
    error = (functional.dequantize_4bit(blocks, state) - values).abs().max().item()
    # The widest gap between two values of NF4 or FP4 is a third of the block's largest: half of it is the error.
    if not error < 0.2:
        raise RuntimeError(f"{kind} on {device} is off by {error:.2f} of the largest value")
    return f"{kind} works on {device}"


def _dotted(gpu: Gpu) -> str:
    return f"{gpu.capability[0]}.{gpu.capability[1]}"
