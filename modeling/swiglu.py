"""SwiGLU (arXiv 2002.05202), the gated activation of all of DeepSeek's feed-forward layers."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) · up. For the backward pass it keeps its two inputs, and computes silu(gate) again where autograd
    would keep that too: activations of feed-forward layers are most of what training keeps, and a third of them that.
    """

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def gated_activation(act_fn: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act_fn(gate) · up, of tensors of one shape."""
    if not torch.is_grad_enabled() or not (gate.requires_grad or up.requires_grad):
        return act_fn(gate).mul_(up)  # in place: memory of this size costs as much to get as to fill
    if isinstance(act_fn, SiLUActivation):
        return _GatedSiLU.apply(gate, up)
    return act_fn(gate) * up
