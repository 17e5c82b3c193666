"""Where the time of a decoding step or a LoRA training step goes, by operation, ours beside transformers'.

python benchmarks/profile_steps.py decode --length 16384
python benchmarks/profile_steps.py lora --length 1024
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from models import ALL_LAYERS, Pair, build_pair, filled_caches, random_tokens
from rows.decode import decode_step
from rows.lora import adapted, lora_step
from torch.profiler import ProfilerActivity, profile

SHOWN = 15  # operations


def decode_steps(pair: Pair, context: int) -> tuple[Callable, Callable]:
    """One decoding step of each model on `context` cached tokens."""
    token = random_tokens(pair, 1, 1)
    caches = filled_caches(pair, 1, context)
    ours, theirs = (partial(decode_step, model, token, cache) for model, cache in zip(pair, caches, strict=True))
    return ours, theirs


def lora_steps(pair: Pair, length: int) -> tuple[Callable, Callable]:
    """One LoRA step of each model on a row of `length` tokens."""
    tokens = random_tokens(pair, 1, length)
    ours, theirs = (partial(lora_step, model, tokens) for model in adapted(pair))
    return ours, theirs


STEPS = {"decode": decode_steps, "lora": lora_steps}


def seconds_by_operation(step: Callable, device: torch.device) -> dict[str, float]:
    """Seconds of one warmed-up step spent in each operation itself, without the operations that it calls.

    On a GPU these are the seconds of its kernels.
    """
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        step()
    attribute = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"  # microseconds
    return {event.key: getattr(event, attribute) / 1e6 for event in profiler.key_averages()}


def table(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """The most expensive operations of either, with milliseconds and shares; the rest in one line."""
    totals = sum(ours.values()), sum(theirs.values())
    ranked = sorted({*ours, *theirs}, key=lambda name: -max(ours.get(name, 0.0), theirs.get(name, 0.0)))
    shown, rest = ranked[:SHOWN], ranked[SHOWN:]
    rows = [(name, ours.get(name, 0.0), theirs.get(name, 0.0)) for name in shown]
    rows.append((f"{len(rest)} others", *(sum(side.get(name, 0.0) for name in rest) for side in (ours, theirs))))
    rows.append(("all", *totals))
    lines = ["| operation | deepseek_hf | share | transformers | share |", "| --- | --- | --- | --- | --- |"]
    for name, *seconds in rows:
        cells = [f"{s * 1e3:.1f} ms | {s / total:.0%}" for s, total in zip(seconds, totals, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--length", type=int, default=1024, help="tokens: cached for decode, in the row for lora")
    parser.add_argument("--layers", type=int, help="default: 2, on cuda 27")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    layers = arguments.layers or (ALL_LAYERS if on_gpu else 2)
    pair = build_pair(layers, device, torch.bfloat16 if on_gpu else torch.float32)
    ours, theirs = STEPS[arguments.step](pair, arguments.length)
    print(f"{arguments.step}, {arguments.length} tokens, {layers} layers\n")
    print(table(seconds_by_operation(ours, device), seconds_by_operation(theirs, device)))


if __name__ == "__main__":
    main()
