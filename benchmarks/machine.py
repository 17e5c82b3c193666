"""What the machine can do at best, measured in the same run as the models: every row is also given as a share of it."""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from work import Work

MATMUL_WIDTH = {"cpu": 4096, "cuda": 8192}
STREAMED_BYTES = 1 << 30  # far more than any cache holds


@dataclass(frozen=True)
class Machine:
    """A device with its two limits: `flops_per_second` of a large square matrix product, and `bytes_per_second` of
    reading weights that no cache holds, both in the dtype of the run."""

    name: str
    device: str
    dtype: str
    threads: int
    flops_per_second: float
    bytes_per_second: float

    def limit_seconds(self, *phases: Work) -> float:
        """Least time for `phases` done one after the other, each bound by arithmetic or by memory (roofline)."""
        return sum(max(p.flops / self.flops_per_second, p.bytes / self.bytes_per_second) for p in phases)

    @property
    def slug(self) -> str:
        """The name of this machine's result files."""
        threads = f" {self.threads} threads" if self.device == "cpu" else ""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.name}{threads} {self.dtype}".lower()).strip("-")

    def as_dict(self) -> dict:
        return asdict(self)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Takes a few seconds. The best of several repetitions counts, since nothing but noise makes one slower."""
    width = MATMUL_WIDTH[device.type]
    square = torch.randn(width, width, device=device).to(dtype)
    product = torch.empty_like(square)
    matmul = best_seconds(lambda: torch.mm(square, square, out=product), device, repetitions=4)

    weight = torch.ones(STREAMED_BYTES // dtype.itemsize // 8192, 8192, device=device, dtype=dtype)
    vector = torch.ones(8192, device=device, dtype=dtype)
    readers = (lambda: weight.sum(), lambda: torch.mv(weight, vector))  # which is faster depends on the device
    streaming = min(best_seconds(read, device, repetitions=8) for read in readers)
    return Machine(
        name=device_name(device),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        flops_per_second=2 * width**3 / matmul,
        bytes_per_second=weight.nbytes / streaming,
    )


def best_seconds(call: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Shortest time in seconds of one `call`, of which the first, untimed, warms up."""
    call()
    times = []
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The model name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()
