"""The gated activation against the same written out, in float64, where the two round alike to 1e-12."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from deepseek_hf.modeling.swiglu import gated_activation


@pytest.mark.parametrize("trained", ["gate", "up", "both"])
def test_values_and_gradients(trained):
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    gate.requires_grad_(trained != "up")
    up.requires_grad_(trained != "gate")
    inputs = [tensor for tensor in (gate, up) if tensor.requires_grad]
    upstream = torch.randn(5, 7, dtype=torch.float64)
    expected = F.silu(gate) * up
    output = gated_activation(ACT2FN["silu"], gate, up)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    for found, wanted in zip(
        torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_keeps_two_tensors_for_the_backward_pass():
    kept = []
    gate, up = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated_activation(ACT2FN["silu"], gate, up)
    assert len(kept) == 2


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_other_activations(name):
    gate, up = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    torch.testing.assert_close(gated_activation(ACT2FN[name], gate, up), ACT2FN[name](gate) * up)
