"""Time and memory of two implementations, taken in alternation so that a drifting machine slows both alike.

Memory on the CPU is the process's resident memory, whose high-water mark Linux lets us reset (hence Linux with glibc
only); on a GPU it is what torch has allocated.
"""

import ctypes
import gc
import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from machine import Limits, Machine, synchronize

SHORTEST_REPETITION = 1.0  # seconds; shorter calls are repeated this long, as steps of a generation are


@dataclass(frozen=True)
class Measurement:
    """Median `seconds` a call, and the most memory, in bytes, that a call takes beyond what was held before it."""

    seconds: float
    extra_bytes: int


class Comparison(NamedTuple):
    """Two implementations, and the machine's limits meanwhile."""

    ours: Measurement
    theirs: Measurement
    limits: Limits


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repetitions: int, machine: Machine
) -> Comparison:
    """Measures `ours`, `theirs` and the limits of `machine` in turn, `repetitions` times. The caller has warmed both
    up."""
    sides, limits = ([], []), []
    for _ in range(repetitions):
        for side, call in zip(sides, (ours, theirs), strict=True):
            side.append(measure(call, machine.device))
        limits.append(machine.measure_limits())
    medians = (
        Measurement(statistics.median(once.seconds for once in side), max(once.extra_bytes for once in side))
        for side in sides
    )
    return Comparison(*medians, Limits.median(limits))


def measure(call: Callable[[], object], device: torch.device) -> Measurement:
    """One repetition: `call` as often as fits `SHORTEST_REPETITION`, at least once."""
    gc.collect()
    return_freed_memory()
    before = reset_peak(device)
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SHORTEST_REPETITION:
        call()
        synchronize(device)
        calls += 1
    return Measurement(elapsed / calls, peak_bytes(device) - before)


def return_freed_memory() -> None:
    """Gives the system what glibc's allocator holds free; the next call would take it again without growing."""
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> int:
    """Starts the high-water mark anew; returns what is held now, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory held since `reset_peak`, in bytes, weights included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return int(kibibytes) * 1024


def limit_memory(limit: int) -> None:
    """Lets this process hold `limit` bytes of data; an allocation beyond fails.

    The limit is on written memory (RLIMIT_DATA), not on address space, of which torch reserves far more than it uses.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
