"""One Transformer block of DeepSeek: attention, then a dense MLP or a mixture of experts, each behind an RMSNorm.

Shapes: B batch, T tokens, N = B·T, H hidden, E routed experts, K experts a token.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase

from .attention import MultiHeadAttention, MultiHeadLatentAttention
from .causal_mask import QueryBlockMasks
from .experts import MLP, MixtureOfExperts


class DecoderLayerOutput(NamedTuple):
    """`hidden_states` [B, T, H]; of a mixture of experts also `router_logits` [N, E] and `topk_index` [N, K].

    The routing is returned, not kept in the module, so that balance losses and loads count each token once, also where
    gradient checkpointing runs the layer twice. To be unpacked: reentrant checkpointing makes a plain tuple of it.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor | None = None
    topk_index: torch.Tensor | None = None


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block; which kind of attention and feed-forward it holds follows from the configuration."""

    def __init__(self, config: DeepseekConfigBase, layer_idx: int):
        super().__init__()
        attention = MultiHeadLatentAttention if hasattr(config, "kv_lora_rank") else MultiHeadAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = MixtureOfExperts(config) if config.is_moe_layer(layer_idx) else MLP(config, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | QueryBlockMasks | None = None,
        token_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> DecoderLayerOutput:
        """`hidden_states` [B, T, H]; `token_mask` [B, T] is True for real tokens, `None` where all are."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, MixtureOfExperts):
            output, router_logits, topk_index = self.mlp(normed, token_mask)
            return DecoderLayerOutput(hidden_states + output, router_logits, topk_index)
        return DecoderLayerOutput(hidden_states + self.mlp(normed))
