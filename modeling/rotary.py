"""Rotary position embedding: RoPE (arXiv 2104.09864) and its long-context form YaRN (arXiv 2309.00071).

Shapes: B batch, T tokens, H heads, R rotated width (even), R/2 rotation angles a token.

The families lay the rotated dimensions out differently. A rotation by angle θ turns the pair (a, b) into
(a·cos θ - b·sin θ, b·cos θ + a·sin θ); what differs is which two dimensions make a pair:

- half-split (V1): dimension i pairs with i + R/2;
- interleaved (V2, V3): dimension 2i pairs with 2i + 1.
"""

import math

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles of each position, shared by all layers.

    `attention_scaling` is YaRN's temperature on cos and sin: DeepSeek's ratio of `mscale` to `mscale_all_dim`, 1 where
    the two are equal. The other half of the temperature sits in the softmax scale, see `softmax_scale`.
    """

    def __init__(self, config: DeepseekConfigBase):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        initial_frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = initial_frequencies(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Follows the model to another device, but not to another dtype: rounded frequencies are other frequencies."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != exact[name].dtype:
                setattr(self, name, exact[name].to(buffer.device))
        return self

    @staticmethod
    def compute_default_rope_parameters(config: DeepseekConfigBase) -> tuple[torch.Tensor, float]:
        """Plain RoPE's angular frequencies [R/2] in radians a token, and the scale on cos and sin, 1.

        transformers calls it by this name to refill the buffers of a model built on the meta device.
        """
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # recomputes `inv_freq` for the rope types whose frequencies follow the sequence length
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` [B, T] → cos and sin, each [B, T, R/2] in float32 on `x`'s device.

        They stay in float32 whatever the model's dtype: in bfloat16 the angles of far positions would collapse.
        """
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotates `x` [B, H, T, R] by the angles of `cos`, `sin` [B, T, R/2].

    Interleaved input comes out half-split, as in DeepSeek's code: queries and keys are permuted alike, so their
    products do not change.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def softmax_scale(config: DeepseekConfigBase, query_width: int) -> float:
    """Scale of the attention scores: 1/√query_width, times YaRN's temperature squared where `mscale_all_dim` is set.

    DeepSeek folds the temperature into the scale of the whole score, squared because it stands for a factor on the
    query and one on the key (published `DeepseekV2Attention`; V3 inference `MLA`).
    """
    scale = query_width**-0.5
    rope = config.rope_parameters
    mscale_all_dim = rope.get("mscale_all_dim")
    if rope["rope_type"] == "yarn" and mscale_all_dim and rope["factor"] > 1:
        temperature = 0.1 * mscale_all_dim * math.log(rope["factor"]) + 1.0
        scale *= temperature**2
    return scale
