"""What the cache holds: one latent and one rotary key a token and layer, DeepSeek-V2 §2.1.3."""

from collections.abc import Iterator

from models import assert_agreement, build_pair, filled_caches, random_tokens
from results import Result, Setup, Target
from transformers.cache_utils import Cache

from deepseek_hf.modeling.latent_cache import GROWTH_BLOCK
from deepseek_hf.modeling.quantized_cache import QuantizedLatentCache

from .decode import decode_step

LAYERS = 2
CONTEXT = 4096


def cache_bytes(cache: Cache) -> int:
    """Bytes of all memory that the cache keeps alive, unused room included. Views of
    one buffer count once."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def run(setup: Setup) -> Iterator[Result]:
    """The cache after one more token than fills its blocks, when most of its room is unused; then the same in 8 bits.

    Raises `AssertionError` where it takes more than its numbers and one growth block.
    """
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    our_cache, their_cache = filled_caches(pair, 1, CONTEXT)
    token = random_tokens(pair, 1, 1)
    difference = assert_agreement(
        "decode before counting the cache",
        decode_step(pair.ours, token, our_cache),
        decode_step(pair.theirs, token, their_cache),
        setup.dtype,
    )
    tokens = our_cache.get_seq_length()
    quantized = QuantizedLatentCache()
    for index, layer in enumerate(our_cache.layers):
        quantized.update(layer.keys, layer.values, index)
    a_token = (pair.config.kv_lora_rank + pair.config.qk_rope_head_dim) * setup.dtype.itemsize * layers
    ours, theirs = cache_bytes(our_cache), cache_bytes(their_cache)
    if ours > (tokens + GROWTH_BLOCK) * a_token:
        raise AssertionError(f"cache: {ours} bytes for {tokens} tokens of {a_token} bytes and one growth block")
    yield Result(
        row="cache",
        case=f"{tokens} tokens",
        unit="bytes a token and layer",
        layers=layers,
        ours=ours / tokens / layers,
        theirs=theirs / tokens / layers,
        ratio=ours / theirs,
        of_limit=tokens * a_token / ours,
        target=Target((tokens + GROWTH_BLOCK) / tokens, at_most=True),
        difference=difference,
        note=f"C + R numbers take {a_token // layers} bytes; ours adds at most {GROWTH_BLOCK} tokens of unused room",
    )
    yield Result(
        row="cache",
        case=f"{tokens} tokens, 8 bits",
        unit="bytes a token and layer",
        layers=layers,
        ours=cache_bytes(quantized) / tokens / layers,
        theirs=theirs / tokens / layers,
        ratio=cache_bytes(quantized) / theirs,
        note="`QuantizedLatentCache` beside transformers' unquantised cache",
    )
