"""A linear layer applied by its weight, whichever way is the fastest.

Layers stay torch's own `nn.Linear`: tools that quantise, shard or adapt a model look for that very type.
"""

import torch
from torch import nn

from .expert_lora import ExpertLinear, active_adapters, has_no_hooks


def project(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`layer(states)`, [..., in] → [..., out].

    `layer` is what stands in the place of an `nn.Linear`. It is not called where that would come to W·x, or to
    W·x + B·(A·x) for a weight that PEFT adapts as a parameter.
    """
    adapters = active_adapters(layer)
    base = layer.get_base_layer() if adapters else layer
    if not _is_a_weight(base):
        return layer(states)
    projection = ExpertLinear(base.weight, *adapters.get("weight", ()))
    return projection(states.reshape(-1, states.shape[-1])).view(*states.shape[:-1], base.weight.shape[0])


def _is_a_weight(layer: nn.Module) -> bool:
    """Whether calling `layer` multiplies by its weight and does nothing else."""
    return (
        type(layer) is nn.Linear and layer.bias is None and type(layer.weight) is nn.Parameter and has_no_hooks(layer)
    )
