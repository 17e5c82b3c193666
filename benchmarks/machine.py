"""What the machine can do at best, measured beside the models: every row is also given as a share of it."""

import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from work import Work

MATMUL_WIDTH = {"cpu": 4096, "cuda": 8192}
STREAMED_BYTES = 1 << 30  # far more than any cache holds


@dataclass(frozen=True)
class Limits:
    """What a device can do at best, both in the dtype of the run: `flops_per_second` of a large square matrix product,
    and `bytes_per_second` of reading weights that no cache holds."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, *phases: Work) -> float:
        """Least time for `phases` done one after the other, each bound by arithmetic or by memory (roofline)."""
        return sum(max(p.flops / self.flops_per_second, p.bytes / self.bytes_per_second) for p in phases)

    @classmethod
    def median(cls, several: Sequence["Limits"]) -> "Limits":
        return cls(*(statistics.median(values) for values in zip(*map(astuple, several), strict=True)))


class Machine:
    """A device, and the probes of its limits. Those of a shared machine drift, so each comparison takes its own."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.threads = device, dtype, torch.get_num_threads()
        self.name = device_name(device)
        width = MATMUL_WIDTH[device.type]
        self.square = torch.randn(width, width, device=device).to(dtype)
        self.product = torch.empty_like(self.square)
        self.weight = torch.ones(STREAMED_BYTES // dtype.itemsize // 8192, 8192, device=device, dtype=dtype)
        vector = torch.ones(8192, device=device, dtype=dtype)
        readers = (lambda: self.weight.sum(), lambda: torch.mv(self.weight, vector))
        # Which is faster depends on the device.
        self.read = min(readers, key=lambda reader: best_seconds(reader, device, repetitions=4))
        self.measure_limits()  # warms up

    def measure_limits(self) -> Limits:
        """The limits of this moment; takes about a second on a CPU."""
        matmul = best_seconds(lambda: torch.mm(self.square, self.square, out=self.product), self.device, repetitions=1)
        streaming = best_seconds(self.read, self.device, repetitions=4)
        return Limits(2 * self.square.shape[0] ** 3 / matmul, self.weight.nbytes / streaming)

    @property
    def slug(self) -> str:
        """The name of this machine's result files."""
        return re.sub(r"[^a-z0-9]+", "-", str(self).lower()).strip("-")

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.device.type == "cpu" else ""
        return f"{self.name}{threads}, {str(self.dtype).removeprefix('torch.')}"


def best_seconds(call: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Shortest time in seconds of one `call`: nothing but noise makes one slower."""
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
