"""Configurations of the three DeepSeek families. Field names are those of the official `config.json` files.

| class              | `model_type`  | paper                          | checkpoints                 |
| ------------------ | ------------- | ------------------------------ | --------------------------- |
| `DeepseekConfig`   | `deepseek`    | DeepSeekMoE (arXiv 2401.06066) | deepseek-moe-16b            |
| `DeepseekV2Config` | `deepseek_v2` | DeepSeek-V2 (arXiv 2405.04434) | V2, V2-Lite, V2.5, Coder-V2 |
| `DeepseekV3Config` | `deepseek_v3` | DeepSeek-V3 (arXiv 2412.19437) | V3, V3.1, R1, Moonlight     |

Fields that a class does not know (`auto_map`, `ep_size`, `quantization_config`, …) are kept as attributes and written
back by `save_pretrained`. The legacy spellings `rope_scaling`, `rope_theta` and `torch_dtype` are read into
transformers' `rope_parameters` and `dtype`.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .validation import (
    check_attention_heads,
    check_mixture_of_experts,
    check_multi_token_prediction,
    check_rotary,
    check_sizes,
)

# Tensor-parallel plans, in transformers' vocabulary of styles. The mixture of experts is split alike in all families.
_MLP_TP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# MLA is split over heads; the latent and the rotary key belong to all heads and stay whole on every rank.
_MLA_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_MHA_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


@strict
class DeepseekConfigBase(PreTrainedConfig):
    """The fields that all DeepSeek families share; not a model type of its own.

    Fields beyond the official ones:

    - `mtp_loss_weight`: λ of the joint training loss, DeepSeek-V3 §2.2 (eq. 25).
    - `device_aux_loss_alpha`, `comm_aux_loss_alpha`: α₂ and α₃, the device-level and communication balance factors of
      DeepSeek-V2 §2.1.3; `aux_loss_alpha` is α₁, the expert-level factor.
    - `n_expert_devices`: D, over how many devices the routed experts are spread for those losses and for token
      dropping; `None` means one device per routing group (`n_group`).
    - `expert_capacity_factor`: token dropping in training, DeepSeek-V2 §2.1.4; `None` drops nothing.
    """

    # Not the Trainer's predictions.
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "mtp_loss", "mtp_losses"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0

    # DeepSeekMoE
    moe_intermediate_size: int = 1408
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float | int = 1.0
    output_router_logits: bool = False

    # Balance
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True
    device_aux_loss_alpha: float | int = 0.0
    comm_aux_loss_alpha: float | int = 0.0
    n_expert_devices: int | None = None
    expert_capacity_factor: float | int | None = None

    # Multi-Token Prediction
    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float | int = 0.3

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` holds a mixture of experts (DeepSeekMoE §3) or a dense MLP.

        MTP layers (`layer_idx >= num_hidden_layers`) hold a mixture wherever the model has one.
        """
        if self.n_routed_experts is None:
            return False
        if layer_idx >= self.num_hidden_layers:
            return True
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def validate_architecture(self):
        """Run on construction, and again when a model is built from the configuration."""
        super().validate_architecture()
        check_sizes(self)
        check_rotary(self)
        check_mixture_of_experts(self)
        check_multi_token_prediction(self)


@strict
class DeepseekConfig(DeepseekConfigBase):
    """DeepSeekMoE (arXiv 2401.06066). The defaults are deepseek-moe-16b's: multi-head attention, softmax routing."""

    model_type = "deepseek"
    base_model_tp_plan = _MHA_TP_PLAN | _MLP_TP_PLAN

    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        check_attention_heads(self)  # before a width is made of them
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        check_attention_heads(self)


@strict
class MultiHeadLatentAttentionConfig(DeepseekConfigBase):
    """The fields of Multi-head Latent Attention (DeepSeek-V2 §2.1); shared by V2 and V3, not a model type of its own.

    `q_lora_rank=None` leaves the queries uncompressed, as in V2-Lite. `rope_interleave` says how the checkpoint lays
    out the rotary dimensions: interleaved pairs in all published V2 and V3 weights.
    """

    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True

    def __post_init__(self, **kwargs):
        # transformers' shared code (RoPE, caches) reads these two; `head_dim` is the width that is rotated.
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim
        super().__post_init__(**kwargs)
        if self.base_model_tp_plan is not None:  # queries come from `q_proj` or from its low-rank pair
            absent = ".q_b_proj" if self.q_lora_rank is None else ".q_proj"
            self.base_model_tp_plan = {
                name: style for name, style in self.base_model_tp_plan.items() if not name.endswith(absent)
            }


@strict
class DeepseekV2Config(MultiHeadLatentAttentionConfig):
    """DeepSeek-V2 (arXiv 2405.04434). The defaults are DeepSeek-V2-Lite's."""

    model_type = "deepseek_v2"
    base_model_tp_plan = _MLA_TP_PLAN | _MLP_TP_PLAN

    num_hidden_layers: int = 27
    max_position_embeddings: int = 163840


@strict
class DeepseekV3Config(MultiHeadLatentAttentionConfig):
    """DeepSeek-V3 and -R1 (arXiv 2412.19437, 2501.12948). The defaults are DeepSeek-V3's, less its YaRN parameters.

    `num_nextn_predict_layers` defaults to 0: a `config.json` that does not mention MTP layers announces none.
    """

    model_type = "deepseek_v3"
    base_model_tp_plan = _MLP_TP_PLAN

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    q_lora_rank: int | None = 1536
    moe_intermediate_size: int = 2048
    n_routed_experts: int | None = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int | None = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float | int = 2.5
