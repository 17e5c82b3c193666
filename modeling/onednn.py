"""Matrix products on a CPU, in float32, by oneDNN.

Shapes: n tokens, I and O a weight's input and output widths; B batch, S cached tokens, C their width.

torch multiplies float32 matrices by MKL and all other types by oneDNN. A decoding step and an expert multiply few rows,
and for those oneDNN's float32 kernels are the faster ones too; `benchmarks/` has the figures. torch offers them to its
compiler only, by a private operator (read in torch 2.13); where that is missing, torch's own products do the work.
"""

import torch
import torch.nn.functional as F

# Multiplications below which oneDNN's preparation of a product, some 30 µs, takes longer than it saves.
SMALLEST_PRODUCT = 2**20
KEY_BLOCK = 256  # cached tokens
HAS_OPERATOR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Linear(torch.autograd.Function):
    """states · weightᵀ, and its gradients."""

    @staticmethod
    def forward(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _product(states, weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        states, weight = inputs
        # As in torch's own products, a frozen weight keeps nothing alive: it needs no gradient made of the states.
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        states, weight = ctx.saved_tensors
        of_states, of_weight = ctx.needs_input_grad
        # The operator has no gradient, which a gradient's gradient (`create_graph`) would need.
        multiply = F.linear if torch.is_grad_enabled() else _product
        return multiply(gradient, weight.t()) if of_states else None, gradient.t() @ states if of_weight else None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` [n, I] · `right` [O, I]ᵀ, without gradients."""
    if torch.compiler.is_compiling():
        return _compiled_product(left, right)
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


@torch.library.custom_op("deepseek_hf::onednn_product", mutates_args=())
def _compiled_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`_product` as the compiler can take it, which wants the operator itself with packed weights only."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


@_compiled_product.register_fake
def _(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


def linear(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` of `states` [n, I] and `weight` [O, I] → [n, O]."""
    if not _is_for_onednn(states, weight, states.numel() * weight.shape[0]):
        return F.linear(states, weight)
    return _Linear.apply(states, weight) if _needs_gradient(states, weight) else _product(states, weight)


def attention_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`queries` [B, n, C] · `keys` [B, S, C] → [B, n, S]."""
    whole = _blocks_for_onednn(queries, keys, queries.numel() * keys.shape[1])
    if not whole:
        return queries @ keys.mT
    scores = _product(queries[0], keys[0, :whole]).unsqueeze(0)
    return torch.cat([scores, queries @ keys[:, whole:].mT], dim=-1) if whole < keys.shape[1] else scores


def weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`weights` [B, n, S] · `values` [B, S, C] → [B, n, C]."""
    whole = _blocks_for_onednn(weights, values, weights.numel() * values.shape[2])
    if not whole:
        return weights @ values
    output = _product(weights[0, :, :whole], values[0, :whole].t()).unsqueeze(0)
    return torch.baddbmm(output, weights[:, :, whole:], values[:, whole:]) if whole < values.shape[1] else output


def _blocks_for_onednn(left: torch.Tensor, cached: torch.Tensor, multiplications: int) -> int:
    """How many of the tokens in `cached` [B, S, C] oneDNN should multiply with: whole blocks, as it compiles a kernel
    for each shape that it meets, and S is another in every step. For several rows, MKL's batches are the faster ones.
    """
    if cached.shape[0] != 1 or _needs_gradient(left, cached) or not _is_for_onednn(left, cached[0], multiplications):
        return 0
    return cached.shape[1] // KEY_BLOCK * KEY_BLOCK


def _needs_gradient(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)


def _is_for_onednn(left: torch.Tensor, right: torch.Tensor, multiplications: int) -> bool:
    return (
        left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and multiplications >= SMALLEST_PRODUCT
        and (right.is_contiguous() or right.mT.is_contiguous())  # for others oneDNN has no fast kernel
        and not torch.is_autocast_enabled("cpu")  # it would have torch compute in bfloat16
        and not torch.compiler.is_exporting()  # what is exported shall run elsewhere
        and not torch.jit.is_tracing()
        and torch.backends.mkldnn.enabled
        and HAS_OPERATOR
    )
