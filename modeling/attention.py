"""Attention: Multi-head Latent Attention (DeepSeek-V2 §2.1, arXiv 2405.04434) and V1's multi-head attention.

Shapes: B batch, T query tokens, S key tokens (cached and new), H heads, C latent width (`kv_lora_rank`), R rotary width
(`qk_rope_head_dim`), N content width of a query or key head (`qk_nope_head_dim`), V width of a value head.

MLA in one paragraph. Keys and values of all heads are linear images of one latent c of C numbers a token: k = W_UK·c,
v = W_UV·c (`kv_b_proj` holds both). Position cannot be folded into that product, so each key carries R more numbers,
rotated, and shared by all heads. Only c and those R numbers are cached: C + R a token and layer (576 for V2 and V3)
where multi-head attention would keep 2·H·(N + R). There are two ways to attend to the cache:

- expanded: bring keys and values of all heads back from the latents, then attend as usual. Cheap a query, dear a key.
- absorbed: since q·(W_UK·c) = (W_UKᵀ·q)·c, map the query into the latent space and attend to the latents themselves,
  as if all heads shared one key of width C + R and one value of width C. Cheap a key, dear a query.

Prefill and training have as many queries as keys and expand; decoding has one query and absorbs (`absorbing_is_cheaper`
counts the operations).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfig, MultiHeadLatentAttentionConfig

from .causal_mask import QUERY_BLOCK, QueryBlockMasks, query_blocks
from .onednn import attention_scores, weighted_sum
from .projection import effective_weight, project
from .rotary import apply_rotary, softmax_scale

# The published code leaves the epsilon of the two latent norms at this value, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: `query` [B, H, T, D], `key` [B, G, S, D], `value` [B, G, S, V], G dividing H →
    `(output [B, T, H, V], weights [B, H, T, S])`. `attention_mask` is additive and broadcasts to [B, H, T, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | QueryBlockMasks | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the kernel that the configuration names, through transformers' interface; a long mask is applied
    block by block. Shapes as in `eager_attention`; the weights are `None` from kernels that do not keep them."""
    kernel: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    kwargs |= {"scaling": module.scaling, "dropout": module.attention_dropout if module.training else 0.0}
    if not isinstance(attention_mask, QueryBlockMasks):
        return kernel(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for start, end, visible, mask in attention_mask.blocks(query.device):
        block = (query[:, :, start:end], key[:, :, :visible], value[:, :, :visible])
        outputs.append(kernel(module, *block, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


class MultiHeadAttention(nn.Module):
    """V1's attention (deepseek-moe-16b): MHA, or GQA / MQA with fewer key-value heads; half-split RoPE."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        self.scaling = softmax_scale(config, self.head_dim)
        self.is_causal = True
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | QueryBlockMasks | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, T, hidden] → `(output [B, T, hidden], weights [B, H, T, S] or None)`."""
        query, key, value = (
            project(layer, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = apply_rotary(query, *position_embeddings, interleaved=False)
        key = apply_rotary(key, *position_embeddings, interleaved=False)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return project(self.o_proj, output.flatten(2)), weights


class MultiHeadLatentAttention(nn.Module):
    """MLA, DeepSeek-V2 §2.1; unchanged in DeepSeek-V3.

    The cache entry of a token is its normed latent [C] and its rotated shared key [R], stored where a `Cache` keeps
    keys and values: [B, 1, S, C] and [B, 1, S, R].
    """

    def __init__(self, config: MultiHeadLatentAttentionConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.attention_dropout = config.attention_dropout
        self.scaling = softmax_scale(config, self.qk_head_dim)
        self.is_causal = True
        self.num_key_value_groups = 1  # expanded, every head has its own keys and values

        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.num_heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | QueryBlockMasks | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, T, hidden] → `(output [B, T, hidden], weights [B, H, T, S] or None)`."""
        q_nope, q_rope = self.queries(hidden_states, position_embeddings)
        latent, k_rope = self.latents(hidden_states, position_embeddings)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)

        absorbs = self._can_absorb() and self.absorbing_is_cheaper(q_nope.shape[2], latent.shape[2])
        kv_b_weight = effective_weight(self.kv_b_proj) if absorbs else None
        if kv_b_weight is None:
            output, weights = self.attend_expanded(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        else:
            output, weights = self.attend_absorbed(q_nope, q_rope, latent, k_rope, attention_mask, kv_b_weight)
        return project(self.o_proj, output.flatten(2)), weights

    def queries(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, hidden] → the queries' content part [B, H, T, N] and rotated part [B, H, T, R] (eq. 37-40)."""
        if self.config.q_lora_rank is None:
            query = project(self.q_proj, hidden_states)
        else:
            query = project(self.q_b_proj, self.q_a_layernorm(project(self.q_a_proj, hidden_states)))
        query = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rotary(q_rope, *position_embeddings, interleaved=self.config.rope_interleave)

    def latents(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, hidden] → what is cached: normed latents [B, 1, T, C], rotated keys [B, 1, T, R] (eq. 41, 43)."""
        compressed = project(self.kv_a_proj_with_mqa, hidden_states).unsqueeze(1)
        latent, k_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_rope = apply_rotary(k_rope, *position_embeddings, interleaved=self.config.rope_interleave)
        return self.kv_a_layernorm(latent), k_rope

    def attend_expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | QueryBlockMasks | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values brought back from the latents (eq. 42, 44-46), through transformers' attention interface.

        → `(output [B, T, H, V], weights [B, H, T, S] or None)`.
        """
        expanded = project(self.kv_b_proj, latent.squeeze(1)).unflatten(
            -1, (-1, self.qk_nope_head_dim + self.v_head_dim)
        )
        k_nope, value = expanded.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        query = torch.cat([q_nope, q_rope], dim=-1)
        key = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        # Flash kernels want one width for keys and values, and torch's CPU SDPA leaves its flash kernel for one that
        # builds the whole score matrix when they differ. The added zeros are cut off again below.
        if self.config._attn_implementation != "eager" and self.v_head_dim < self.qk_head_dim:
            value = F.pad(value, (0, self.qk_head_dim - self.v_head_dim))
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return output[..., : self.v_head_dim], weights

    def attend_absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | QueryBlockMasks | None,
        kv_b_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W_UK absorbed into the query and W_UV into the output; nothing is expanded (DeepSeek-V2 §2.1.2). The two lie
        in `kv_b_weight` [H·(N + V), C].

        → `(output [B, T, H, V], weights [B, H, T, S])`, the weights with "eager" attention only.
        """
        _, H, T, _ = q_nope.shape
        w_uk, w_uv = kv_b_weight.unflatten(0, (H, -1)).split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_latent = (q_nope * self.scaling) @ w_uk  # [B, H, T, N] @ [H, N, C] → [B, H, T, C]
        q_rope = q_rope * self.scaling
        latent, k_rope = latent.squeeze(1), k_rope.squeeze(1)  # [B, S, C], [B, S, R]
        # "eager" is the one that gives weights away: all of them in one tensor, which the output depends on.
        gives_weights = self.config._attn_implementation == "eager"
        contexts = []
        for start, end, visible, mask in query_blocks(
            attention_mask, T, latent.shape[1], latent.device, T if gives_weights else QUERY_BLOCK
        ):
            # All heads share the keys, so heads and queries together are the rows of one product.
            scores = sum(
                attention_scores(query[:, :, start:end].flatten(1, 2), key[:, :visible])
                for query, key in ((q_latent, latent), (q_rope, k_rope))
            ).unflatten(1, (H, -1))  # [B, H, T, S], of the block
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            elif mask is not None:
                scores = scores + mask
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(q_nope.dtype)
            contexts.append(weighted_sum(weights.flatten(1, 2), latent[:, :visible]).unflatten(1, (H, -1)))
        context = torch.cat(contexts, dim=2)  # [B, H, T, C]
        output = (context @ w_uv.transpose(1, 2)).transpose(1, 2)
        if not gives_weights:
            return output, None
        return output, weights if visible == latent.shape[1] else F.pad(weights, (0, latent.shape[1] - visible))

    def absorbing_is_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Whether the absorbed form takes fewer multiplications for T queries on S keys (counted a head).

        Expanded: S·C·(N + V) to bring back keys and values, T·S·(N + R + V) to attend.
        Absorbed: T·C·(N + V) to map queries in and outputs out, T·S·(2C + R) to attend.
        """
        N, R, V, C = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank
        expanded = num_keys * C * (N + V) + num_queries * num_keys * (N + R + V)
        absorbed = num_queries * C * (N + V) + num_queries * num_keys * (2 * C + R)
        return absorbed < expanded

    def _can_absorb(self) -> bool:
        """Attention dropout and the attention kernels of the paged and flash backends, which take their masks in other
        forms, need expanded keys."""
        dropout = self.training and self.attention_dropout
        return not dropout and self.config._attn_implementation in ("eager", "sdpa")
