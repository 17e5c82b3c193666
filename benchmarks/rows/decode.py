"""Decoding: one token a row at a time, on a cache that already holds a long context."""

from collections.abc import Iterator
from functools import partial

import torch
from measuring import Comparison, alternate
from models import Pair, assert_agreement, build_pair, filled_caches, random_tokens
from results import Result, Setup, Target, timed
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from work import Work, latent_attention, weights

LAYERS, REPETITIONS = 4, 5
TARGET_AT = {1024: 3.0, 4096: 8.0, 16384: 30.0, 32768: 50.0}  # context: times faster than transformers
BATCH, BATCH_CONTEXT, BATCH_TARGET = 8, 4096, 8.0
STREAMING_TARGET = 0.8


@torch.no_grad()
def decode_step(model: PreTrainedModel, token: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits [B, 1, W] after `token` [B, 1]; the cache grows by it."""
    return model(token, past_key_values=cache, use_cache=True).logits


def measure_decode(setup: Setup, pair: Pair, batch: int, context: int) -> tuple[Comparison, float]:
    """Our step against transformers', and the relative difference of the logits.

    The checked step also warms up, and grows our cache by the block that the timed steps then fill: a context is
    `context` tokens at first, and some tens more at the end.
    """
    our_cache, their_cache = filled_caches(pair, batch, context)
    token = random_tokens(pair, batch, 1)
    step_ours = partial(decode_step, pair.ours, token, our_cache)
    step_theirs = partial(decode_step, pair.theirs, token, their_cache)
    what = f"decode, batch {batch}, context {context}"
    difference = assert_agreement(what, step_ours(), step_theirs(), setup.dtype)
    return alternate(step_ours, step_theirs, setup.repetitions or REPETITIONS, setup.machine), difference


def decode_work(pair: Pair, batch: int, context: int) -> tuple[Work, Work]:
    """Every active weight and every cached number, read once."""
    itemsize = pair.ours.dtype.itemsize
    return weights(pair.ours, pair.config, batch), latent_attention(pair.config, batch, context, itemsize)


def run_contexts(setup: Setup) -> Iterator[Result]:
    """Batch 1 at growing contexts; the shortest against the speed of reading weights; the growth from first to last."""
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    measured = {}
    for context, target in TARGET_AT.items():
        measured[context], difference = measure_decode(setup, pair, 1, context)
        yield timed(
            1,
            measured[context],
            decode_work(pair, 1, context),
            row="decode",
            case=f"batch 1, context {context}",
            layers=layers,
            target=Target(target),
            difference=difference,
            length=context,
        )

    shortest, longest = min(TARGET_AT), max(TARGET_AT)
    active_bytes, short, long = weights(pair.ours, pair.config, 1).bytes, measured[shortest], measured[longest]
    yield Result(
        row="decode",
        case=f"active weights read, context {shortest}",
        unit="GB/s",
        layers=layers,
        ours=active_bytes / short.ours.seconds / 1e9,
        theirs=active_bytes / short.theirs.seconds / 1e9,
        of_limit=active_bytes / short.limits.bytes_per_second / short.ours.seconds,
        limits=short.limits,
        target=Target(STREAMING_TARGET, of="of_limit"),
        note=f"{active_bytes / 1e6:.0f} MB of active weights a token",
    )
    ours_grown = long.ours.seconds - short.ours.seconds
    theirs_grown = long.theirs.seconds - short.theirs.seconds
    attention = latent_attention(pair.config, 1, longest - shortest, pair.ours.dtype.itemsize)
    yield Result(
        row="decode",
        case=f"added by context {shortest} → {longest}",
        unit="ms a step",
        layers=layers,
        ours=ours_grown * 1e3,
        theirs=theirs_grown * 1e3,
        ratio=theirs_grown / ours_grown,
        of_limit=long.limits.seconds(attention) / ours_grown,
        limits=long.limits,
        note="limit: attention over C + R values a token and layer, and nothing else",
    )


def run_batch(setup: Setup) -> Iterator[Result]:
    """A batch of rows at a middling context."""
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    compared, difference = measure_decode(setup, pair, BATCH, BATCH_CONTEXT)
    yield timed(
        BATCH,
        compared,
        decode_work(pair, BATCH, BATCH_CONTEXT),
        row="decode-batch",
        case=f"batch {BATCH}, context {BATCH_CONTEXT}",
        layers=layers,
        target=Target(BATCH_TARGET),
        difference=difference,
    )
