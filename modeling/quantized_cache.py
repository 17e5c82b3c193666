"""The latent cache in 8 bits: C + R bytes a token and layer, and four for each scale.

Shapes: B batch, S cached tokens, C latent width (`kv_lora_rank`), R rotary width (`qk_rope_head_dim`), W any width, G
scales.

DeepSeek-V3 multiplies activations in FP8 with one scale for every tile of 1 × 128 values (§3.3.2, arXiv 2412.19437); a
cached token is stored likewise, as integers. With a scale of its own, no later token can leave the range that the first
ones set, as it can in transformers' `QuantizedCache(backend="fp8")` (one scale for all; what is larger becomes NaN).
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .latent_cache import LatentCacheLayer

TILE = 128
LARGEST = 127


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., W] → codes [..., W] int8 and scales [..., G] float32, one for each `TILE` of a token's values."""
    width = states.shape[-1]
    tiles = F.pad(states.float(), (0, -width % TILE)).unflatten(-1, (-1, TILE))
    scales = (tiles.abs().amax(dim=-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (tiles / scales.unsqueeze(-1)).round().to(torch.int8)
    return codes.flatten(-2)[..., :width], scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, to half a step of a scale: [..., W] in `dtype`."""
    return (codes * scales.repeat_interleave(TILE, dim=-1)[..., : codes.shape[-1]]).to(dtype)


class QuantizedLatentCacheLayer(LatentCacheLayer):
    """One layer's latents and rotary keys as 8-bit integers. `keys` [B, 1, S, C] are the codes of the latents, `values`
    those of the rotary keys with the bytes of all scales behind them, so that whatever moves, repeats or crops tokens
    moves their scales along. `update` gives them back dequantised; no gradient flows through it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends latents [B, 1, T, C] and rotary keys [B, 1, T, R]; returns all, [B, 1, S, C] and [B, 1, S, R]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (keys, key_scales), (values, value_scales) = quantize(key_states.detach()), quantize(value_states.detach())
        scales = torch.cat([key_scales, value_scales], dim=-1).view(torch.int8)
        codes, tail = super().update(keys, torch.cat([values, scales], dim=-1))

        width = value_states.shape[-1]
        scales = tail[..., width:].contiguous().view(torch.float32)
        key_scales, value_scales = scales.split([key_scales.shape[-1], value_scales.shape[-1]], dim=-1)
        return dequantize(codes, key_scales, self.dtype), dequantize(tail[..., :width], value_scales, self.dtype)


class QuantizedLatentCache(Cache):
    """A cache for `generate(past_key_values=QuantizedLatentCache())` that takes half the memory of one in bfloat16, a
    quarter of one in float32."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=QuantizedLatentCacheLayer)
