"""Prefill: a whole prompt at once, into a fresh cache, for the logits of its last token."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from measuring import Comparison, Measurement, alternate, limit_memory, measure, peak_bytes
from models import Pair, assert_agreement, build_pair, random_tokens
from results import Result, Setup, Target, timed
from transformers import PreTrainedModel
from work import Work, causal_attention, weights

LAYERS, REPETITIONS = 2, 3
CHECKED_TOKENS = 256
TARGET_AT = {1024: None, 4096: Target(1.6)}
LONG_PROMPT = 16384
MEMORY_LIMIT = 12 * 10**9  # bytes; on a GPU there is none


@torch.no_grad()
def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, 1, W] after the prompt `tokens` [B, T]."""
    return model(tokens, use_cache=True, logits_to_keep=1).logits


@torch.no_grad()
def check_prefill(pair: Pair, dtype: torch.dtype) -> float:
    """Relative difference of all logits of a short prompt; warms both models up."""
    tokens = random_tokens(pair, 1, CHECKED_TOKENS)
    return assert_agreement(
        f"prefill, {CHECKED_TOKENS} tokens", pair.ours(tokens).logits, pair.theirs(tokens).logits, dtype
    )


def prefill_work(pair: Pair, tokens: int) -> tuple[Work, ...]:
    """Every token through every active weight, the last also through the head; causal attention."""
    ours, config = pair.ours, pair.config
    attention = causal_attention(config, 1, tokens, ours.dtype.itemsize)
    return weights(ours.model, config, tokens), weights(ours.lm_head, config, 1), attention


def run(setup: Setup) -> Iterator[Result]:
    """Prompts that both can take, in alternation."""
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    difference = check_prefill(pair, setup.dtype)
    for length, target in TARGET_AT.items():
        tokens = random_tokens(pair, 1, length)
        compared = alternate(
            partial(prefill, pair.ours, tokens),
            partial(prefill, pair.theirs, tokens),
            setup.repetitions or REPETITIONS,
            setup.machine,
        )
        yield timed(
            length,
            compared,
            prefill_work(pair, length),
            row="prefill",
            case=f"{length} tokens",
            layers=layers,
            target=target,
            difference=difference,
            length=length,
        )


class LongPrefill(NamedTuple):
    """One model on the long prompt: `measurement` is `None` where memory ran out, and `failure` says how."""

    measurement: Measurement | None
    failure: str
    peak_bytes: int
    difference: float
    work: tuple[Work, ...]


def long_prefill(side: str, layers: int, device: torch.device, dtype: torch.dtype) -> LongPrefill:
    """Prefills the long prompt once with one model of the pair, `side`: "ours" or "theirs". To be run in a process of
    its own, whose peak memory is then that of weights and prefill alone."""
    pair = build_pair(layers, device, dtype)
    difference = check_prefill(pair, dtype)
    tokens = random_tokens(pair, 1, LONG_PROMPT)
    measurement, failure = None, ""
    try:
        measurement = measure(partial(prefill, getattr(pair, side), tokens), device)
    except RuntimeError as error:  # torch's out-of-memory errors, which on the CPU have no class of their own
        if "allocate" not in str(error):
            raise
        failure = str(error).strip().splitlines()[0]
    return LongPrefill(measurement, failure, peak_bytes(device), difference, prefill_work(pair, LONG_PROMPT))


def in_own_process(setup: Setup, side: str, layers: int) -> LongPrefill:
    """`long_prefill` in a new process, on the CPU under `MEMORY_LIMIT`."""
    limit = {"initializer": limit_memory, "initargs": (MEMORY_LIMIT,)} if setup.device.type == "cpu" else {}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **limit) as pool:
        return pool.submit(long_prefill, side, layers, setup.device, setup.dtype).result()


def run_long(setup: Setup) -> Iterator[Result]:
    """The long prompt, once a model. Raises `MemoryError` where ours does not fit the limit."""
    layers = setup.layers or LAYERS
    ours, theirs = (in_own_process(setup, side, layers) for side in ("ours", "theirs"))
    if ours.measurement is None:
        raise MemoryError(
            f"prefill, {LONG_PROMPT} tokens: ours needs more than {MEMORY_LIMIT:.0e} bytes: {ours.failure}"
        )
    fields = {
        "row": "prefill-16k",
        "case": f"{LONG_PROMPT} tokens",
        "layers": layers,
        "difference": ours.difference,
        "length": LONG_PROMPT,
        "note": f"peak memory of the process: ours {ours.peak_bytes / 1e9:.1f} GB",
    }
    limits = setup.machine.measure_limits()
    if theirs.measurement is not None:
        fields["note"] += f", transformers {theirs.peak_bytes / 1e9:.1f} GB"
        compared = Comparison(ours.measurement, theirs.measurement, limits)
        yield timed(LONG_PROMPT, compared, ours.work, **fields)
        return
    fields["note"] += f"; transformers fails within {MEMORY_LIMIT / 1e9:.0f} GB: {theirs.failure}"
    yield Result(
        unit="tok/s",
        ours=LONG_PROMPT / ours.measurement.seconds,
        of_limit=limits.seconds(*ours.work) / ours.measurement.seconds,
        limits=limits,
        ours_extra_bytes=ours.measurement.extra_bytes,
        **fields,
    )
