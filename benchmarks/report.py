"""The results of one machine, kept over several runs: a JSON file, a table in markdown, and plots."""

import json
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import torch
import transformers
from machine import Machine
from results import Result

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
HEADER = [
    "row",
    "case",
    "layers",
    "unit",
    "deepseek_hf",
    "transformers",
    "ratio",
    "target",
    "met",
    "of limit",
    "outputs differ by",
]
STYLE = {"ours": {"label": "deepseek_hf", "marker": "o"}, "theirs": {"label": "transformers", "marker": "s"}}


class Report:
    """The result files of `machine`. A case measured again replaces its older result; the others stay, each with the
    limits, versions and date of its own run."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.path = RESULTS / f"{machine.slug}.json"
        self.cases: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, result: Result) -> None:
        """Takes `result` in and rewrites all files, so that an interrupted run keeps what it has measured."""
        run = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        }
        self.cases[result.key] = {**result.as_dict(), "run": run}
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.cases, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.as_markdown())
        self.plot_decode()
        self.plot_memory()

    def as_markdown(self) -> str:
        """The table, and below it the notes and the machine's limits."""
        cases = self.cases.values()
        limits = [case["limits"] for case in cases if case["limits"]]
        runs = {f"torch {case['run']['torch']}, transformers {case['run']['transformers']}" for case in cases}
        lines = [
            f"# {self.machine}",
            "",
            f"{'; '.join(sorted(runs))}. Limits measured with the rows: matrix product "
            f"{span([limit['flops_per_second'] / 1e9 for limit in limits])} GFLOP/s, weight streaming "
            f"{span([limit['bytes_per_second'] / 1e9 for limit in limits])} GB/s.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + " --- |" * len(HEADER),
            *("| " + " | ".join(table_row(case)) + " |" for case in cases),
            "",
            *(f"- {key}: {case['note']}." for key, case in self.cases.items() if case["note"]),
        ]
        return "\n".join(lines) + "\n"

    def plot_decode(self) -> None:
        """Decoding speed at batch 1 against context length."""
        cases = self.with_length("decode")
        if not cases:
            return
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for side, style in STYLE.items():
            axes.plot([case["length"] for case in cases], [case[side] for case in cases], **style)
        label_lengths(axes, cases, "context in tokens")
        axes.set(yscale="log", ylabel="tokens a second", title=f"Decoding, batch 1, {cases[0]['layers']} layers")
        self.save_plot(figure, "decode")

    def plot_memory(self) -> None:
        """Memory that a step takes beyond weights and cache: decoding, and prefill (with the cache that it makes)."""
        panels = [("one decoding step", "context in tokens", self.with_length("decode"))]
        panels.append(("prefill", "prompt in tokens", self.with_length("prefill", "prefill-16k")))
        panels = [panel for panel in panels if panel[-1]]
        if not panels:
            return
        figure, all_axes = plt.subplots(
            1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False
        )
        for axes, (title, label, cases) in zip(all_axes[0], panels, strict=True):
            for side, style in STYLE.items():
                known = [case for case in cases if case[f"{side}_extra_bytes"] is not None]
                axes.plot([c["length"] for c in known], [c[f"{side}_extra_bytes"] / 1e9 for c in known], **style)
            failed = [case["length"] for case in cases if case["theirs_extra_bytes"] is None]
            if failed:
                axes.axvline(min(failed), color="C1", linestyle=":", label="transformers: out of memory")
            label_lengths(axes, cases, label)
            axes.set(
                ylabel="extra memory at the peak, GB", title=f"{title}, {cases[0]['layers']} layers", ylim=(0, None)
            )
        self.save_plot(figure, "memory")

    def with_length(self, *rows: str) -> list[dict]:
        """The cases of `rows` that a plot shows, by length."""
        cases = [case for case in self.cases.values() if case["row"] in rows and case["length"] is not None]
        return sorted(cases, key=lambda case: case["length"])

    def save_plot(self, figure: plt.Figure, name: str) -> None:
        figure.savefig(self.path.with_name(f"{self.machine.slug}-{name}.png"), dpi=120)
        plt.close(figure)


def table_row(case: dict) -> list[str]:
    """The cells of one case; "" where a quantity does not apply."""
    met = {None: "", True: "yes", False: "no"}[case["target_met"]]
    ratio = "" if case["ratio"] is None else f"{case['ratio']:.2f}×"
    of_limit = "" if case["of_limit"] is None else f"{case['of_limit']:.0%}"
    difference = "" if case["difference"] is None else f"{case['difference']:.0e}"
    figures = [figure(case["ours"]), figure(case["theirs"])]
    named = [case["row"], case["case"], str(case["layers"]), case["unit"]]
    return [*named, *figures, ratio, case["target"] or "", met, of_limit, difference]


def figure(value: float | None) -> str:
    """Three significant digits or all whole ones, without an exponent."""
    if value is None:
        return "—"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def span(values: list[float]) -> str:
    """ "low–high", or one number where the two round alike."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low}–{high}"


def label_lengths(axes: plt.Axes, cases: list[dict], label: str) -> None:
    """A logarithmic axis of token counts with a tick at each measured one, a light grid and a legend."""
    lengths = [case["length"] for case in cases]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
