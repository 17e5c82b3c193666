"""The routed experts alone: tokens that the router has already spread over them."""

from collections.abc import Iterator
from functools import partial

import torch
from measuring import alternate
from models import assert_agreement, build_pair
from results import Result, Setup, Target, timed
from work import weights

LAYERS, REPETITIONS = 2, 9  # the first layer is dense, the second holds the experts
TARGET_AT = {1: 1.15, 16: 1.0, 128: 1.0, 512: 1.15}  # tokens: times faster than transformers; never slower


@torch.no_grad()
def run(setup: Setup) -> Iterator[Result]:
    """One layer's experts, at few tokens bound by reading their weights, at many by arithmetic."""
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    our_mlp, their_mlp = pair.ours.model.layers[1].mlp, pair.theirs.model.layers[1].mlp
    for tokens, target in TARGET_AT.items():
        hidden = torch.randn(tokens, pair.config.hidden_size, device=setup.device).to(setup.dtype)
        _, topk_weight, topk_index = our_mlp.gate(hidden)
        forward_ours, forward_theirs = (
            partial(mlp.experts, hidden, topk_index, topk_weight) for mlp in (our_mlp, their_mlp)
        )
        difference = assert_agreement(f"experts, {tokens} tokens", forward_ours(), forward_theirs(), setup.dtype)
        compared = alternate(forward_ours, forward_theirs, setup.repetitions or REPETITIONS, setup.machine)
        yield timed(
            tokens,
            compared,
            [weights(our_mlp.experts, pair.config, tokens)],
            row="experts",
            case=f"{tokens} tokens",
            layers=1,
            target=Target(target),
            difference=difference,
        )
