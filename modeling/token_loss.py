"""Cross-entropy over a large vocabulary, some tokens at a time.

Shapes: B batch, T tokens, N tokens with a target, H hidden, W vocabulary.

At 4k tokens and 100k words the logits of one head take 1.7 GB in float32, and as much again twice over in its loss and
gradient; each MTP depth (DeepSeek-V3 §2.2) would add the same. Here only the logits of `TOKENS_AT_A_TIME` exist at any
time. They are computed once more in the backward pass, a forward of the output head that the saved memory costs.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .projection import project

TOKENS_AT_A_TIME = 512
IGNORED = -100


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies of `lm_head(hidden_states)` in float32, over `num_items`; by default the mean.

    `lm_head` is used as a layer, so that adapters, quantisation and tensor parallelism do their part.

    Args:
        hidden_states: [B, T, H].
        targets: [B, T], -100 where no loss is wanted: those positions are left out before the head.
    """
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten().to(hidden_states.device)
    wanted = targets != IGNORED
    if num_items is None:
        num_items = wanted.sum().clamp(min=1)
    if not torch.compiler.is_compiling():  # compiled code wants to know how many there are; it computes all
        if not wanted.any():
            wanted[:1] = True  # so that every rank uses the head; without a target its loss and gradient are zero
        hidden_states, targets = hidden_states[wanted], targets[wanted]

    def loss_of(states: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(project(lm_head, states).float(), chunk, ignore_index=IGNORED, reduction="sum")

    total = hidden_states.new_zeros((), dtype=torch.float32)
    chunks = zip(hidden_states.split(TOKENS_AT_A_TIME), targets.split(TOKENS_AT_A_TIME), strict=True)
    for states, chunk in chunks:
        total = total + checkpoint(loss_of, states, chunk, use_reentrant=False)
    return total / num_items
