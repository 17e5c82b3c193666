"""Matrix products of the experts on a CPU, in float32, by oneDNN.

Shapes: n tokens of one expert, I and O its input and output widths.

torch multiplies float32 matrices by MKL and all other types by oneDNN. An expert's product has few rows, and for those
oneDNN's float32 kernels are the faster ones too; `benchmarks/` has the figures. torch offers them to its compiler only,
by a private operator (read in torch 2.13); where that is missing, `F.linear` does the work.
"""

import torch
import torch.nn.functional as F

# Multiplications below which oneDNN's preparation of a product, some 30 µs, takes longer than it saves.
SMALLEST_PRODUCT = 2**21


class _Linear(torch.autograd.Function):
    """states · weightᵀ, and its gradients."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        states, weight = ctx.saved_tensors
        of_states, of_weight = ctx.needs_input_grad  # frozen experts need none of their own
        return _product(gradient, weight.t()) if of_states else None, gradient.t() @ states if of_weight else None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _has_operator() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` of `states` [n, I] and `weight` [O, I] → [n, O]."""
    if (
        states.device.type == weight.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and states.numel() * weight.shape[0] >= SMALLEST_PRODUCT
        and not torch.is_autocast_enabled("cpu")  # it would have `F.linear` compute in bfloat16
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and _has_operator()
    ):
        if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
            return _Linear.apply(states, weight)
        return _product(states, weight)
    return F.linear(states, weight)
