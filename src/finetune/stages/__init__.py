"""The twelve stages, one module each; importing this package pins the CPU code path before torch or numpy load."""

from finetune.log import quiet_libraries
from finetune.runtime import pin_cpu_code_path

pin_cpu_code_path()
quiet_libraries()
