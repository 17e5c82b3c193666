"""A layer applied by its weight does what calling it does. Tolerance: float32 sums over 300 products, reordered."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from deepseek_hf.modeling import projection
from deepseek_hf.modeling.projection import effective_weight, project

TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


class Holder(nn.Module):
    def __init__(self, bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(300, 4000, bias=bias)


@pytest.fixture
def by_weight(monkeypatch) -> list[torch.Tensor]:
    """The states of the projections that did not call their layer."""
    seen = []

    class Recorded(projection.ExpertLinear):
        def __call__(self, states):
            seen.append(states)
            return super().__call__(states)

    monkeypatch.setattr(projection, "ExpertLinear", Recorded)
    return seen


@pytest.mark.parametrize("shape", [(300,), (2, 300), (2, 3, 300)])
@torch.no_grad()
def test_plain_layer(shape, by_weight):
    layer, states = Holder().layer, torch.randn(shape)
    torch.testing.assert_close(project(layer, states), layer(states), **TOLERANCE)
    assert len(by_weight) == 1


@pytest.mark.parametrize("target", [{"target_parameters": ["layer.weight"]}, {"target_modules": ["layer"]}])
@pytest.mark.parametrize("bias", [False, True])
def test_adapted_layer(target, bias, by_weight):
    holder = Holder(bias)
    inject_adapter_in_model(LoraConfig(r=4, init_lora_weights=False, **target), holder)
    states = torch.randn(3, 300)
    torch.testing.assert_close(project(holder.layer, states), holder.layer(states), **TOLERANCE)
    assert len(by_weight) == (not bias)
    weight = effective_weight(holder.layer)
    assert (weight is None) == bias
    if not bias:
        torch.testing.assert_close(states @ weight.T, holder.layer(states), **TOLERANCE)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"dtype": torch.bfloat16}, {"merged": True}]
)
def test_what_adapters_do_besides_is_left_to_peft(settings, by_weight):
    holder = Holder()
    dtype, merged = settings.pop("dtype", None), settings.pop("merged", False)
    inject_adapter_in_model(LoraConfig(r=4, init_lora_weights=False, target_modules=["layer"], **settings), holder)
    layer, states = holder.layer, torch.randn(3, 300)
    if dtype is not None:
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    if merged:
        layer.merge()
    outputs = []
    for apply in (lambda: project(layer, states), lambda: layer(states)):
        torch.manual_seed(0)
        outputs.append(apply())
    assert torch.equal(*outputs)
    assert not by_weight


def hooked() -> nn.Module:
    layer = Holder().layer
    layer.register_forward_hook(lambda module, arguments, output: output + 1)
    return layer


def offloaded() -> nn.Module:
    """As accelerate's hooks make it: with a `forward` of its own."""
    layer = Holder().layer
    forward = layer.forward
    layer.forward = lambda states: forward(states) + 1
    return layer


class Quantised(nn.Linear):
    """A layer of another type, as quantisers put in the place of an `nn.Linear`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) + 1


@pytest.mark.parametrize("make", [hooked, offloaded, lambda: Quantised(300, 4000, bias=False)])
@torch.no_grad()
def test_layers_that_do_more_are_called(make, by_weight):
    layer, states = make(), torch.randn(2, 300)
    assert torch.equal(project(layer, states), layer(states))
    assert effective_weight(layer) is None
    assert not by_weight
