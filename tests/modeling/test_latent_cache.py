"""The latent cache against transformers' own dynamic layer: same contents after any sequence of operations."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from deepseek_hf.configuration import DeepseekV3Config
from deepseek_hf.modeling.latent_cache import GROWTH_BLOCK, LatentCacheLayer, use_latent_layers

B, C, R = 2, 8, 4  # batch, latent width, rotary width


class Pair:
    """A latent layer and transformers' layer, driven alike and compared after every step."""

    def __init__(self):
        self.layers = (LatentCacheLayer(), DynamicLayer())

    def append(self, tokens, batch=B, **kwargs):
        latent, rotary = torch.randn(batch, 1, tokens, C, **kwargs), torch.randn(batch, 1, tokens, R, **kwargs)
        ours, theirs = (layer.update(latent, rotary) for layer in self.layers)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        self.compare()

    def apply(self, method, *args):
        for layer in self.layers:
            getattr(layer, method)(*args)
        self.compare()

    def compare(self):
        ours, theirs = self.layers
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


def test_contract_of_a_cache_layer():
    pair = Pair()
    for tokens in (3, 1, GROWTH_BLOCK - 5, 1, 1, GROWTH_BLOCK + 44, 2):
        pair.append(tokens)
    pair.apply("crop", -7)
    pair.append(2)
    pair.apply("reorder_cache", torch.tensor([1, 1]))
    pair.append(1)
    pair.apply("batch_repeat_interleave", 2)
    pair.apply("batch_select_indices", torch.tensor([0, 3, 2]))
    pair.append(4, batch=3)
    pair.apply("offload")
    pair.apply("prefetch")
    for layer in pair.layers:
        layer.reset()
        assert layer.get_seq_length() == 0
    pair.append(5)


def test_recording_gradients_and_then_not():
    pair = Pair()
    pair.append(4)
    pair.append(2, requires_grad=True)
    pair.append(1)
    with torch.no_grad():
        pair.append(3)
        pair.append(1)
    assert all(room(pair.layers[0]))


def room(layer: LatentCacheLayer) -> tuple[int, ...]:
    """For how many more tokens the memory of the latents and of the rotary keys has room."""
    return tuple(
        tensor.untyped_storage().nbytes() // tensor[..., :1, :].nbytes - layer.get_seq_length()
        for tensor in (layer.keys, layer.values)
    )


def test_grows_by_blocks():
    layer = LatentCacheLayer()
    addresses = set()
    for _ in range(2 * GROWTH_BLOCK):
        layer.update(torch.randn(B, 1, 1, C), torch.randn(B, 1, 1, R))
        addresses.add(layer.keys.data_ptr())
        unused = room(layer)
        assert unused[0] == unused[1] < GROWTH_BLOCK
    assert len(addresses) == 2  # copied once, when the first block was full


def test_only_fresh_dynamic_layers_are_replaced():
    config = DeepseekV3Config(num_hidden_layers=2)
    assert all(type(layer) is LatentCacheLayer for layer in use_latent_layers(DynamicCache(config=config)).layers)
    lazy = use_latent_layers(DynamicCache())
    lazy.update(torch.randn(B, 1, 1, C), torch.randn(B, 1, 1, R), layer_idx=1)
    assert [type(layer) for layer in lazy.layers] == [LatentCacheLayer] * 2
    written = DynamicCache(config=config)
    for index in range(2):
        written.update(torch.randn(B, 1, 1, C), torch.randn(B, 1, 1, R), layer_idx=index)
    assert all(type(layer) is DynamicLayer for layer in use_latent_layers(written).layers)
    static = use_latent_layers(StaticCache(config=config, max_cache_len=4))
    assert not any(isinstance(layer, LatentCacheLayer) for layer in static.layers)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3"])
@torch.no_grad()
def test_size_is_latent_and_rotary_key(name, request):
    model = AutoModelForCausalLM.from_pretrained(request.config.rootpath / "tests/fixtures/golden" / name)
    config = model.config
    tokens = torch.randint(0, config.vocab_size, (3, 7))
    for layer in model(tokens, use_cache=True).past_key_values.layers:
        assert layer.keys.shape == (3, 1, 7, config.kv_lora_rank)
        assert layer.values.shape == (3, 1, 7, config.qk_rope_head_dim)
        assert room(layer) == (GROWTH_BLOCK - 7, GROWTH_BLOCK - 7)
