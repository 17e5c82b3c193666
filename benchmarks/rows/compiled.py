"""What `torch.compile` brings: a decoding step on a static cache, and a training step."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measuring import alternate
from models import assert_agreement, build_pair, random_tokens
from results import Result, Setup, timed
from transformers import StaticCache

from .decode import decode_work

LAYERS, REPETITIONS = 2, 5
CONTEXT, TRAINED_TOKENS = 1024, 512


@torch.no_grad()
def static_step(model: Callable, token: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    """Logits [1, 1, W] of the token after `CONTEXT`, time and again at the same place of the cache."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(CONTEXT)
    position = torch.tensor([[CONTEXT]], device=token.device)
    return model(token, past_key_values=cache, use_cache=True, position_ids=position).logits


def training_step(model: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of the row `tokens` [1, T] after forward and backward."""
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def run(setup: Setup) -> Iterator[Result]:
    """Both steps compiled, each against the same one uncompiled."""
    layers = setup.layers or LAYERS
    repetitions = setup.repetitions or REPETITIONS
    pair = build_pair(layers, setup.device, setup.dtype)
    compiled = torch.compile(pair.ours, fullgraph=True)

    cache = StaticCache(config=pair.config, max_cache_len=CONTEXT + 1)
    with torch.no_grad():
        pair.ours(random_tokens(pair, 1, CONTEXT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = random_tokens(pair, 1, 1)
    steps = [partial(static_step, model, token, cache) for model in (compiled, pair.ours)]
    difference = assert_agreement("compiled decode", steps[0](), steps[1](), setup.dtype)
    yield timed(
        1,
        alternate(*steps, repetitions, setup.machine),
        decode_work(pair, 1, CONTEXT),
        row="compiled",
        case=f"decode, static cache of {CONTEXT}",
        layers=layers,
        difference=difference,
        note="beside it not transformers but the same step of ours, uncompiled",
    )

    # Attention and the other matrices are trained; gradients of all experts would not fit beside their weights.
    pair.ours.train()
    for name, parameter in pair.ours.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    tokens = random_tokens(pair, 1, TRAINED_TOKENS)
    steps = [partial(training_step, model, tokens) for model in (compiled, pair.ours)]
    difference = assert_agreement("compiled training", steps[0](), steps[1](), setup.dtype)
    fast, plain, limits = alternate(*steps, repetitions, setup.machine)
    yield Result(
        row="compiled",
        case=f"training step of {TRAINED_TOKENS} tokens, frozen experts",
        unit="tok/s",
        layers=layers,
        ours=TRAINED_TOKENS / fast.seconds,
        theirs=TRAINED_TOKENS / plain.seconds,
        ratio=plain.seconds / fast.seconds,
        limits=limits,
        difference=difference,
        note="beside it not transformers but the same step of ours, uncompiled",
    )
