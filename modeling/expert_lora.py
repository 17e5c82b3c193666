"""LoRA at the cost of its rank (Hu et al. 2021, arXiv 2106.09685): on routed experts above all.

Shapes: E experts of one parameter, n tokens of one expert, R rank (of all active adapters together).

PEFT adapts a bare parameter (`LoraConfig(target_parameters=["mlp.experts.gate_up_proj", ...])`) by a `ParamWrapper`
around the module that holds it, one wrapper inside the other for several parameters. Called, they add the whole
product B·A, as large as all experts' weights, to the parameter in every forward. Here they are asked for their factors
only, and an expert computes W·x + B·(A·x). So does a linear layer that PEFT has adapted. Whatever else a wrapper may be
doing is left to PEFT.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .onednn import linear


class LowRank(NamedTuple):
    """What LoRA adds to a parameter [E, out, in]: the product `b` [E, out, R] · `a` [E, R, in], scaling included.

    Of a parameter [out, in] the two are [out, R] and [R, in].
    """

    a: torch.Tensor
    b: torch.Tensor


class ExpertLinear(NamedTuple):
    """The projection of an expert or of any linear layer: `weight` [out, in], and where LoRA adapts it, `a` [R, in] and
    `b` [out, R]."""

    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """`states` [n, in] → [n, out]."""
        output = linear(states, self.weight)
        return output if self.a is None else torch.addmm(output, F.linear(states, self.a), self.b.t())


class ExpertLinears(Sequence):
    """The projections of all experts, from their fused `weight` [E, out, in] and the `adapter` on it."""

    def __init__(self, weight: torch.Tensor, adapter: LowRank | None):
        self.parts = [_experts_of(tensor) for tensor in (weight, *(adapter or ()))]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, expert: int) -> ExpertLinear:
        return ExpertLinear(*(part[expert] for part in self.parts))


def _experts_of(fused: torch.Tensor) -> Sequence[torch.Tensor]:
    """`fused` [E, …], to be indexed by expert. Where it is trained, that must not be indexing: the gradient of picking
    experts one by one would fill a whole weight tensor for each."""
    return fused.unbind() if torch.is_grad_enabled() and fused.requires_grad else fused


def is_wrapped(module: nn.Module) -> bool:
    """Whether `module` is a layer that PEFT put around another."""
    return hasattr(module, "base_layer")


def active_adapters(module: nn.Module) -> dict[str, LowRank]:
    """What the active LoRA adapters add to the parameters of `module`, which PEFT may have wrapped: name → factors.

    Empty where `module` is to be called as it is: nothing is wrapped, active or unmerged, or the wrappers do more than
    adding B·A (hooks that move or gather weights, variants of LoRA, weights in a type that cannot be computed in).
    """
    if not is_wrapped(module):
        return {}
    adapters = {}
    while is_wrapped(module):
        if not _adds_product_only(module):
            return {}
        factors = [_factors(module, name) for name in module.active_adapters if name in module.lora_A]
        if factors:  # several adapters' ranks beside each other are one adapter's
            a, b = zip(*factors, strict=True)
            name = getattr(module, "parameter_name", "weight")
            adapters[name] = LowRank(torch.cat(a, dim=-2), torch.cat(b, dim=-1))
        module = module.base_layer
    return adapters if has_no_hooks(module) else {}


def _factors(wrapper: nn.Module, adapter: str) -> LowRank:
    if hasattr(wrapper, "get_param") and wrapper.get_param().dim() == 3:
        b, a, scaling = wrapper.get_delta_factors(adapter)
    else:
        dtype = wrapper.get_base_layer().weight.dtype
        a, b = (half[adapter].weight.to(dtype) for half in (wrapper.lora_A, wrapper.lora_B))
        scaling = wrapper.scaling[adapter]
    return LowRank(a, b * scaling)


def _adds_product_only(wrapper: nn.Module) -> bool:
    # Read in PEFT 0.21.2, `tuners/lora/layer.py`; before 0.21 `get_delta_factors` did not exist.
    from peft.tuners.lora import Linear, ParamWrapper  # PEFT is loaded by now; without it there would be no wrapper

    if type(wrapper) is ParamWrapper:
        adds = hasattr(wrapper, "get_delta_factors")
        adds = adds and wrapper.get_param().dtype in (torch.float32, torch.bfloat16, torch.float16)
    else:
        adds = type(wrapper) is Linear and _is_plain(wrapper)
    return (
        adds
        and not wrapper.disable_adapters
        and not wrapper.merged
        and not wrapper.lora_variant
        and has_no_hooks(wrapper)
    )


def _is_plain(wrapper: nn.Module) -> bool:
    """Whether an adapted `nn.Linear` has none of the settings that an adapted parameter cannot have: dropout (at work),
    a bias, a transposed weight, factors in another type than the weight's."""
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    factors = [half[name].weight for half in (wrapper.lora_A, wrapper.lora_B) for name in names]
    return (
        not wrapper.fan_in_fan_out
        and not any(wrapper.lora_bias.values())
        and not (wrapper.training and any(type(layer) is not nn.Identity for layer in wrapper.lora_dropout.values()))
        and all(factor.dtype == wrapper.get_base_layer().weight.dtype for factor in factors)
    )


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does no more than its class says."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    # accelerate's hooks, which offload weights, take the place of `forward`.
    return not any(hooks) and "forward" not in vars(module)
