"""Inputs longer than a block of queries: masked block by block they give what one whole mask gives, in less memory.

Tolerance: float32 logits of magnitude up to 10, computed in another order: 5e-5, and 2e-4 for gradients, which sum over
a hundred times as many tokens as in `test_attention.py`.
"""

import pytest
import torch
from small_models import FAMILIES, padded, random_ids, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from deepseek_hf.modeling.causal_mask import QUERY_BLOCK

T = 2 * QUERY_BLOCK + 76
SIZES = {"max_position_embeddings": 2048, "num_hidden_layers": 2, "vocab_size": 61}
# Where the latent is narrower than half a head, attending to latents is cheaper at any length.
NARROW_LATENT = {"kv_lora_rank": 8}
VARIANTS = [*((family, {}) for family in FAMILIES), ("v2", NARROW_LATENT), ("v3", NARROW_LATENT)]


def model(family: str, implementation: str, fields: dict):
    return small_model(family, implementation, **SIZES, **fields)


def inputs(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of the model, and [B, T], True at the tokens whose logits matter."""
    if kind == "full":
        return {"input_ids": random_ids(1, T)}, torch.ones(1, T, dtype=torch.bool)
    if kind == "packed":  # documents that end within a block, and one that spans three
        positions = torch.tensor([[*range(200), *range(T - 210), *range(10)]])
        return {"input_ids": random_ids(1, T), "position_ids": positions}, torch.ones(1, T, dtype=torch.bool)
    ids, mask = padded([random_ids(T), random_ids(T - QUERY_BLOCK - 9, seed=2)], side=kind)
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
@pytest.mark.parametrize(("family", "fields"), VARIANTS)
@torch.no_grad()
def test_blocks_equal_one_mask(family, fields, kind):
    given, real = inputs(kind)
    expected = model(family, "eager", fields)(**given).logits
    torch.testing.assert_close(model(family, "sdpa", fields)(**given).logits[real], expected[real], atol=5e-5, rtol=0)


@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize(("family", "fields"), VARIANTS)
@torch.no_grad()
def test_chunks_longer_than_a_block_on_a_cache(family, fields, cache):
    given, real = inputs("left")
    ids, mask = given.values()
    expected = model(family, "eager", fields)(**given).logits
    ours = model(family, "sdpa", fields)
    cache = StaticCache(config=ours.config, max_cache_len=T + 50) if cache == "static" else None
    logits, seen = [], 0
    for chunk in ids.split([300, T - 303, 3], dim=1):
        seen += chunk.shape[1]
        output = ours(chunk, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], atol=5e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_gradients(family, fields, checkpointing):
    given, _ = inputs("packed")
    gradients = []
    for implementation in ("eager", "sdpa"):
        trained = model(family, implementation, fields).train()
        if checkpointing and implementation == "sdpa":
            trained.gradient_checkpointing_enable()
        trained(**given, labels=given["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


class LargestTensor(TorchDispatchMode):
    """While entered, notes the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_no_tensor_grows_with_the_square_of_the_length(family, fields, kind):
    """Not in training, not on a cache. One mask would have T² elements, a block has a third of them for each row and,
    in latents, each head; weights and logits are smaller."""
    given, _ = inputs(kind)
    ours = model(family, "sdpa", fields)
    with LargestTensor() as largest:
        ours.train()(**given, labels=given["input_ids"]).loss.backward()
    rows = given["input_ids"].shape[0]
    heads = ours.config.num_attention_heads if fields else 1
    assert largest.elements <= rows * heads * QUERY_BLOCK * T
    if kind == "packed":
        return
    with torch.no_grad(), LargestTensor() as largest:
        ours.eval()
        seen, cache = T - QUERY_BLOCK - 10, None
        for chunk in given["input_ids"].split([seen, T - seen], dim=1):
            mask = given.get("attention_mask")
            mask = None if mask is None else mask[:, : chunk.shape[1] if cache is None else T]
            cache = ours(chunk, attention_mask=mask, past_key_values=cache, use_cache=True).past_key_values
    assert largest.elements <= rows * heads * QUERY_BLOCK * T


def test_eager_attention_does_allocate_it():
    """The measure of the test above sees what it is there to exclude."""
    with torch.no_grad(), LargestTensor() as largest:
        model("v3", "eager", {})(random_ids(1, T))
    assert largest.elements >= T * T
