"""Matrix products on a CPU. Tolerance: float32 sums over 300 products, taken in another order."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_hf.modeling.onednn import KEY_BLOCK, SMALLEST_PRODUCT, attention_scores, linear, weighted_sum

TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.mark.parametrize("rows", [1, 7, SMALLEST_PRODUCT // (70 * 300) + 1, SMALLEST_PRODUCT // (140 * 300) + 1])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_equals_torch_linear(rows, frozen, part):
    """Also of a part of a tensor, as one expert's weight or the rows of one expert are."""
    torch.manual_seed(0)
    states, weight = torch.randn(2 * rows, 300), torch.randn(2, 2 * 70, 300)
    gradient = torch.randn(rows, 70 if part else 140)
    results = []
    for function in (F.linear, linear):
        x = states.clone().requires_grad_()
        w = weight.clone().requires_grad_(not frozen)
        output = function(x[rows:], w[1, 70:] if part else w[1])
        output.backward(gradient)
        results.append((output.detach(), x.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(linear(states, weight[0]), F.linear(states, weight[0]), **TOLERANCE)


def test_other_types_are_left_to_torch():
    states, weight = torch.randn(3, 20), torch.randn(5, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(states, weight).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float64):
        given = states.to(dtype), weight.to(dtype)
        torch.testing.assert_close(linear(*given), F.linear(*given), rtol=0, atol=0)


@pytest.mark.parametrize("recording", [False, True])
def test_compiled(recording):
    states = torch.randn(SMALLEST_PRODUCT // (140 * 300) + 1, 300, requires_grad=recording)
    weight = torch.randn(140, 300)
    found, expected = torch.compile(linear, fullgraph=True)(states, weight), F.linear(states, weight)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    if recording:
        gradients = [torch.autograd.grad(output.sum(), states)[0] for output in (found, expected)]
        torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exported_code_has_torch_operators_alone():
    class Product(torch.nn.Module):
        def forward(self, states, weight):
            return linear(states, weight)

    inputs = torch.randn(SMALLEST_PRODUCT // (140 * 300) + 1, 300), torch.randn(140, 300)
    exported = torch.export.export(Product(), inputs)
    assert {node.target.namespace for node in exported.graph.nodes if node.op == "call_function"} == {"aten"}
    assert "mkldnn" not in str(torch.jit.trace(Product(), inputs).graph)


def test_second_gradient():
    """A gradient that itself is to be differentiated, as a penalty on it is."""
    torch.manual_seed(0)
    states, weight = torch.randn(SMALLEST_PRODUCT // (140 * 300) + 1, 300), torch.randn(140, 300)
    results = []
    for function in (F.linear, linear):
        x, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, w).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.mean(), w)[0])
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("length", [200, 3 * KEY_BLOCK, 3 * KEY_BLOCK + 1])
@pytest.mark.parametrize("dense", [True, False])
@torch.no_grad()
def test_attention_products(batch, length, dense):
    """Also of keys that are a part of wider ones."""
    torch.manual_seed(0)
    keys = torch.randn(batch, length, 300 if dense else 320)[..., :300]
    queries, weights = torch.randn(batch, 16, 300), torch.randn(batch, 16, length)
    torch.testing.assert_close(attention_scores(queries, keys), queries @ keys.mT, **TOLERANCE)
    torch.testing.assert_close(weighted_sum(weights, keys), weights @ keys, **TOLERANCE)


def test_attention_products_have_gradients():
    queries, weights = torch.randn(1, 16, 300, requires_grad=True), torch.randn(1, 16, KEY_BLOCK, requires_grad=True)
    keys = torch.randn(1, KEY_BLOCK, 300)
    (attention_scores(queries, keys).sum() + weighted_sum(weights, keys).sum()).backward()
    torch.testing.assert_close(queries.grad, keys.sum(1, keepdim=True).expand_as(queries), **TOLERANCE)
    torch.testing.assert_close(weights.grad, keys.sum(2).unsqueeze(1).expand_as(weights), **TOLERANCE)
