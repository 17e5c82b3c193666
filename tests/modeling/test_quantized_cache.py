"""The 8-bit latent cache: rounding within half a step, the cache contract, and what it changes in a trained model."""

from pathlib import Path

import pytest
import torch
from small_models import FAMILIES, padded, random_ids, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_hf.modeling.quantized_cache import QuantizedLatentCache, dequantize, quantize

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("width", [1, 64, 128, 300, 512])
def test_rounding(width):
    states = torch.randn(3, 5, width) * torch.logspace(-6, 6, 5)[:, None]
    states[0, 0] = 0
    codes, scales = quantize(states)
    assert codes.dtype == torch.int8
    assert scales.shape == (3, 5, -(-width // 128))
    error = (dequantize(codes, scales, torch.float32) - states).abs()
    # Half a step, and float32's rounding of the quotient and the product.
    assert (error <= scales.repeat_interleave(128, dim=-1)[..., :width] * (0.5 + 1e-4)).all()


def filled(model, ids, **kwargs) -> QuantizedLatentCache:
    return model(ids, past_key_values=QuantizedLatentCache(), use_cache=True, **kwargs).past_key_values


def contents(cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def test_memory():
    model = small_model("v3", kv_lora_rank=512, qk_rope_head_dim=64)
    layer = filled(model, random_ids(2, 256)).layers[0]
    scales = 512 // 128 + 1
    kept = sum(tensor.untyped_storage().nbytes() for tensor in (layer.keys, layer.values))
    assert kept == 2 * 256 * (512 + 64 + 4 * scales)
    half = 2 * 256 * (512 + 64) * 2
    assert kept < 0.52 * half


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache_contract(family):
    model = small_model(family)
    ids = random_ids(3, 300)
    whole = filled(model, ids)
    assert whole.get_seq_length() == 300

    cropped = filled(model, ids)
    cropped.crop(-20)
    assert cropped.get_seq_length() == 280
    model(ids[:, 280:], past_key_values=cropped, use_cache=True)
    # The last tokens' latents were computed from quantised ones this time: other bytes, the same number of them.
    assert [tensor.shape for tensor in contents(cropped)] == [tensor.shape for tensor in contents(whole)]
    for ours, expected in zip(contents(cropped), contents(whole), strict=True):
        assert (ours[..., :280, :] == expected[..., :280, :]).all()

    changed = filled(model, ids)
    changed.reorder_cache(torch.tensor([2, 0, 0]))
    changed.batch_select_indices(torch.tensor([0, 2]))
    changed.batch_repeat_interleave(2)
    for ours, expected in zip(contents(changed), contents(whole), strict=True):
        assert (ours == expected[[2, 2, 0, 0]]).all()
    changed.reset()
    assert changed.get_seq_length() == 0


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"do_sample": True}])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate(family, arguments):
    model = small_model(family)
    ids, mask = padded([random_ids(12), random_ids(7, seed=2)], side="left")
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None, "use_cache": True} | arguments
    output = model.generate(ids, past_key_values=QuantizedLatentCache(), **arguments)
    assert output.shape == (2, 20)


@torch.no_grad()
def test_agreement_on_the_tiny_model():
    """Decoding Python text token by token: the distributions hardly move. Measured: see the README."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-deepseek-v3", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-deepseek-v3")
    ids = tokenizer((EXAMPLES / "stdlib_corpus.py").read_text(), return_tensors="pt").input_ids[:, :400]
    caches = [model(ids[:, :300], use_cache=True).past_key_values, filled(model, ids[:, :300])]
    exact, quantized = (
        torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(300, 400)], dim=1)
        for cache in caches
    )
    exact, quantized = exact.log_softmax(-1), quantized.log_softmax(-1)
    divergence = (exact.exp() * (exact - quantized)).sum(-1)
    # An 8-bit step is 1/254 of the largest of 128 values; that moves probabilities by about its square. Where two
    # experts were nearly as good as each other, it may choose the other one, and that moves them further.
    assert divergence.median() < 1e-3
    assert divergence.mean() < 1e-2
    assert (exact.argmax(-1) == quantized.argmax(-1)).float().mean() >= 0.95
