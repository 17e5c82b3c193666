"""What a row is run with and what it gives."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from machine import Limits, Machine
from measuring import Comparison
from work import Work


@dataclass(frozen=True)
class Setup:
    """What a row is run with. `layers` and `repetitions` are `None` where the row's own defaults hold."""

    machine: Machine
    device: torch.device
    dtype: torch.dtype
    layers: int | None = None
    repetitions: int | None = None


@dataclass(frozen=True)
class Target:
    """A bound on `ratio` or on `of_limit`: at least `bound`, or at most."""

    bound: float
    of: str = "ratio"
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:.3g}" + ("×" if self.of == "ratio" else " of limit")

    def met_by(self, result: "Result") -> bool:
        value = getattr(result, self.of)
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Result:
    """One line of the table.

    - `ours`, `theirs`: the figures, in `unit`; `theirs` is `None` where transformers could not or need not run.
    - `ratio`: how many times faster ours is; for memory, ours / theirs.
    - `of_limit`: the least time (or memory) possible on this machine over ours: 1 is perfect.
    - `difference`: relative difference of the two models' outputs, checked before timing.
    - `limits`: the machine's, measured in alternation with the two.
    - `length`: context or prompt length in tokens, where the plots need it.
    - `ours_extra_bytes`, `theirs_extra_bytes`: peak memory of a call beyond what was held before it.
    """

    row: str
    case: str
    unit: str
    layers: int
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    of_limit: float | None = None
    target: Target | None = None
    difference: float | None = None
    limits: Limits | None = None
    length: int | None = None
    ours_extra_bytes: int | None = None
    theirs_extra_bytes: int | None = None
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.row}: {self.case}"

    def as_dict(self) -> dict:
        met = None if self.target is None else self.target.met_by(self)
        return {**asdict(self), "target": self.target and str(self.target), "target_met": met}


def timed(tokens: int, compared: Comparison, work: Sequence[Work], **fields) -> Result:
    """The result of a timed case that processes `tokens` tokens a call, in phases that cannot do without `work`."""
    ours, theirs, limits = compared
    return Result(
        unit="tok/s",
        ours=tokens / ours.seconds,
        theirs=tokens / theirs.seconds,
        ratio=theirs.seconds / ours.seconds,
        of_limit=limits.seconds(*work) / ours.seconds,
        limits=limits,
        ours_extra_bytes=ours.extra_bytes,
        theirs_extra_bytes=theirs.extra_bytes,
        **fields,
    )


def extra_memory(compared: Comparison, **fields) -> Result:
    """The result of the same calls that tells their peak memory beyond what was held before them."""
    ours, theirs = compared.ours.extra_bytes, compared.theirs.extra_bytes
    return Result(unit="GB", ours=ours / 1e9, theirs=theirs / 1e9, ratio=ours / theirs, **fields)
