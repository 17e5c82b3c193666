"""Small models of the three families with random weights: one dense and two mixture-of-experts layers, 8 experts.

The weights are drawn ten times wider than by default, so that scores differ clearly from expert to expert and from
key to key; with the default they would be nearly uniform and few mistakes would show.
"""

import torch
from transformers import AutoModelForCausalLM

import deepseek_hf.modeling  # noqa: F401  (registers the model types)
from deepseek_hf.configuration import DeepseekConfig, DeepseekV2Config, DeepseekV3Config

FAMILIES = ["v1", "v2", "v3"]
VOCABULARY = 61
PAD, BOS, EOS = 0, 1, 2

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
    "dtype": "float32",
}
# The latent is wider than the heads, as in the real models: then decoding absorbs and prefill expands.
_LATENT_SIZES = {
    "q_lora_rank": 24,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_FAMILY_CONFIGS = {
    "v1": (DeepseekConfig, {}),
    "v2": (DeepseekV2Config, {**_LATENT_SIZES, **_GROUPS, "topk_method": "group_limited_greedy"}),
    "v3": (DeepseekV3Config, {**_LATENT_SIZES, **_GROUPS}),
}


def small_config(family: str, **fields):
    """A config of `family`, with `fields` in place of the small sizes above."""
    config_class, of_family = _FAMILY_CONFIGS[family]
    return config_class(**{**_SIZES, **of_family, **fields})


def small_model(family: str, attn_implementation: str | None = None, **fields):
    """A causal language model of `family` in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_config(small_config(family, **fields), **kwargs).eval()


def drafting_model(family: str, depth: int, scale: float | None = None, **fields):
    """A small model whose MTP layers guess right about as often as not: main model and MTP layers pass on, above all,
    the embedding of the last token they read, which they share, and each adds, `scale`d, something of its own to it."""
    if scale is None:
        scale = 0.1 if family == "v1" else 0.05
    model = small_model(family, num_nextn_predict_layers=depth, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter *= scale
            elif "eh_proj" in name:
                eye = torch.eye(model.config.hidden_size)
                parameter.copy_(torch.cat([0.2 * eye, 0.02 * eye], dim=1))
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids of `shape`, none of them special."""
    return torch.randint(EOS + 1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids [T_i] → `(input_ids, attention_mask)`, both [B, max T_i]; `side` is "left" or "right"."""
    mask = [torch.ones_like(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=PAD, padding_side=side),
        pad(mask, batch_first=True, padding_side=side),
    )


def mixtures(model) -> list:
    """The model's `MixtureOfExperts` modules, in the order of its layers."""
    return [layer.mlp for layer in model.get_decoder().layers if hasattr(layer.mlp, "gate")]
