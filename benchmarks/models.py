"""Both models over the same weights, in DeepSeek-V2-Lite's layer shapes, and the guard that they compute the same.

Shapes: B batch, S cached tokens, C latent width (`kv_lora_rank`), R rotary width (`qk_rope_head_dim`).
"""

from typing import NamedTuple

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v2 import configuration_deepseek_v2 as transformers_configuration
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as transformers_modeling

from deepseek_hf.configuration import DeepseekV2Config
from deepseek_hf.modeling import DeepseekV2ForCausalLM
from deepseek_hf.modeling.latent_cache import use_latent_layers

# deepseek-ai/DeepSeek-V2-Lite/config.json, less the number of layers and the vocabulary. The balance loss is off:
# transformers' classes have none, and the two are to compute the same.
V2_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
    "bos_token_id": None,  # would lie outside the cut vocabulary
    "eos_token_id": None,
    "rms_norm_eps": 1e-6,
    "aux_loss_alpha": 0.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
ALL_LAYERS = 27
VOCABULARY, CUT_VOCABULARY = 102400, 8192

# Of the relative difference of outputs, |a - b| / |b|. Over 27 small layers it reaches 2e-6 in float32, from the order
# of summation, and 0.04 in bfloat16, which rounds at 2^-9 and lets near-ties of the router fall differently.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class Pair(NamedTuple):
    """Our model and transformers' own over one set of weights, in evaluation mode."""

    ours: DeepseekV2ForCausalLM
    theirs: transformers_modeling.DeepseekV2ForCausalLM

    @property
    def config(self) -> DeepseekV2Config:
        return self.ours.config


def build_pair(layers: int, device: torch.device, dtype: torch.dtype) -> Pair:
    """Both models with `layers` layers, the first dense, of random weights that share their storage.

    Fewer than all layers come with a vocabulary cut to `CUT_VOCABULARY`, or the output head would outweigh them.
    """
    fields = {
        **V2_LITE,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY if layers == ALL_LAYERS else CUT_VOCABULARY,
    }
    torch.manual_seed(0)
    with device:
        ours = DeepseekV2ForCausalLM._from_config(DeepseekV2Config(**fields), dtype=dtype)
    config = transformers_configuration.DeepseekV2Config(**fields)
    with torch.device("meta"):
        theirs = transformers_modeling.DeepseekV2ForCausalLM._from_config(config, dtype=dtype)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    # The rotary frequencies are no part of a state dict.
    theirs.model.rotary_emb = transformers_modeling.DeepseekV2RotaryEmbedding(config).to(device)
    return Pair(ours.eval(), theirs.eval())


def filled_caches(pair: Pair, batch: int, context: int) -> tuple[DynamicCache, DynamicCache]:
    """Our cache and transformers', both holding the same `context` tokens of random latents [B, 1, S, C] and rotary
    keys [B, 1, S, R] in every layer: what prefill would leave, without its time."""
    config, weight = pair.config, pair.ours.lm_head.weight
    ours, theirs = use_latent_layers(DynamicCache(config=config)), DynamicCache(config=pair.theirs.config)
    for layer in range(config.num_hidden_layers):
        latent, k_rope = (
            torch.randn(batch, 1, context, width, device=weight.device).to(weight.dtype)
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        # transformers keeps the rotated pairs interleaved, we keep them half-split.
        ours.update(latent, torch.cat([k_rope[..., 0::2], k_rope[..., 1::2]], dim=-1), layer)
        theirs.update(latent, k_rope, layer)
    return ours, theirs


def random_tokens(pair: Pair, *shape: int) -> torch.Tensor:
    """Token ids of the given shape, int64."""
    return torch.randint(pair.config.vocab_size, shape, device=pair.ours.device)


def assert_agreement(what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative difference |ours - theirs| / |theirs| of two outputs of models in `dtype`.

    Raises `AssertionError` above `TOLERANCE`: a speed means nothing where the two compute different things.
    """
    difference = (torch.dist(ours.float(), theirs.float()) / theirs.float().norm()).item()
    if not difference <= TOLERANCE[dtype]:  # so that NaN fails too
        raise AssertionError(
            f"{what}: ours and transformers' differ by {difference:.2e}, tolerance {TOLERANCE[dtype]:.0e}"
        )
    return difference
