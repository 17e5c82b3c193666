"""Absorbed against expanded attention in one layer, on both sides of the number of queries at which we switch.

Shapes: T query tokens, S key tokens, H heads, N content, R rotary, C latent width.
"""

from collections.abc import Iterator
from functools import partial

import torch
from measuring import alternate
from models import assert_agreement, build_pair
from results import Result, Setup, Target

LAYERS, REPETITIONS = 2, 5
CONTEXT = 4096
QUERIES = (1, 16, 64, 128, 256, 512)
# Near the switch point the two take about as long, and operations are not time to the last per cent.
TARGET = Target(0.8)


@torch.no_grad()
def run(setup: Setup) -> Iterator[Result]:
    """For each T: the time of the form that the operation count chooses, and how many times longer the other takes."""
    layers = setup.layers or LAYERS
    attention = build_pair(layers, setup.device, setup.dtype).ours.model.layers[0].self_attn
    config = attention.config
    for queries in QUERIES:

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, device=setup.device).to(setup.dtype)

        heads = config.num_attention_heads
        tensors = (
            random(heads, queries, config.qk_nope_head_dim),
            random(heads, queries, config.qk_rope_head_dim),
            random(1, CONTEXT, config.kv_lora_rank),
            random(1, CONTEXT, config.qk_rope_head_dim),
        )
        mask = torch.ones(1, 1, queries, CONTEXT, dtype=torch.bool, device=setup.device).tril(CONTEXT - queries)
        forms = [
            partial(attention.attend_absorbed, *tensors, mask, attention.kv_b_proj.weight),
            partial(attention.attend_expanded, *tensors, mask),
        ]
        if not attention.absorbing_is_cheaper(queries, CONTEXT):
            forms.reverse()
        what = f"{queries} queries on {CONTEXT} keys"
        difference = assert_agreement(what, forms[0]()[0], forms[1]()[0], setup.dtype)
        chosen, other, limits = alternate(*forms, setup.repetitions or REPETITIONS, setup.machine)
        yield Result(
            row="switch-point",
            case=f"{what}, {'absorbed' if attention.absorbing_is_cheaper(queries, CONTEXT) else 'expanded'}",
            unit="ms",
            layers=1,
            ours=chosen.seconds * 1e3,
            ratio=other.seconds / chosen.seconds,
            target=TARGET,
            limits=limits,
            difference=difference,
            note=f"ratio: the other form's {other.seconds * 1e3:.1f} ms over the chosen one's",
        )
