"""A linear layer applied by its weight, whichever way is the fastest.

Layers stay torch's own `nn.Linear`: tools that quantise, shard or adapt a model look for that very type.
"""

import torch
from torch import nn

from .expert_lora import ExpertLinear, active_adapters, has_no_hooks


def project(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`layer(states)`, [..., in] → [..., out].

    `layer` is what stands in the place of an `nn.Linear`. It is not called where that would come to W·x, or with LoRA
    to W·x + B·(A·x).
    """
    projection = _by_weight(layer)
    if projection is None:
        return layer(states)
    return projection(states.reshape(-1, states.shape[-1])).view(*states.shape[:-1], projection.weight.shape[0])


def effective_weight(layer: nn.Module) -> torch.Tensor | None:
    """The matrix [out, in] that `layer` multiplies by, W or with LoRA W + B·A; `None` where it does anything else."""
    projection = _by_weight(layer)
    if projection is None:
        return None
    if projection.a is None:
        return projection.weight
    return torch.addmm(projection.weight, projection.b, projection.a)


def _by_weight(layer: nn.Module) -> ExpertLinear | None:
    """What `layer` multiplies by; `None` where calling it does anything else, or where its weight is not here whole:
    quantised, offloaded, sharded."""
    adapters = active_adapters(layer)
    base = layer.get_base_layer() if adapters else layer
    if type(base) is nn.Linear and base.bias is None and type(base.weight) is nn.Parameter and has_no_hooks(base):
        return ExpertLinear(base.weight, *adapters.get("weight", ()))
    return None
