"""What makes a configuration impossible. Each check raises one `ValueError`: the field, its value, what is accepted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig, DeepseekConfigBase

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
)
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORING_FUNCTIONS = ("softmax", "sigmoid")


def _require(condition: bool, field: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"`{field}` is {value!r}; accepted: {accepted}.")


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def check_sizes(config: DeepseekConfigBase) -> None:
    """Every width and count that a layer is built from."""
    for field in SIZES:
        size = getattr(config, field, None)  # no family has all; `None` leaves a layer out where its field allows it
        _require(size is None or size >= 1, field, size, "an integer of at least 1")
    _require(
        config.hidden_act in ACT2FN, "hidden_act", config.hidden_act, f"an activation of transformers: {_names(ACT2FN)}"
    )


def check_attention_heads(config: DeepseekConfig) -> None:
    """V1's attention splits `hidden_size` over heads, and shares each key-value head among as many queries."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    _require(
        config.head_dim is not None or (heads >= 1 and config.hidden_size % heads == 0),
        "num_attention_heads",
        heads,
        f"a divisor of `hidden_size` ({config.hidden_size}), or any number with `head_dim` set",
    )
    _require(
        groups is None or (groups >= 1 and heads % groups == 0),
        "num_key_value_heads",
        groups,
        f"a divisor of `num_attention_heads` ({heads})",
    )


def check_rotary(config: DeepseekConfigBase) -> None:
    """RoPE turns pairs of dimensions, so the rotated width must be even; transformers reads it as `head_dim`."""
    field = "qk_rope_head_dim" if hasattr(config, "qk_rope_head_dim") else "head_dim"
    width = getattr(config, field)
    _require(width > 0 and width % 2 == 0, field, width, "a positive even number (RoPE rotates pairs)")
    _require(config.head_dim == width, "head_dim", config.head_dim, f"{width}, the rotated width `{field}`, or nothing")
    rope_types = ("default", *ROPE_INIT_FUNCTIONS)
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    _require(rope_type in rope_types, "rope_parameters['rope_type']", rope_type, f"one of {_names(rope_types)}")


def check_mixture_of_experts(config: DeepseekConfigBase) -> None:
    """Router and experts must fit each other (DeepSeekMoE §3, DeepSeek-V2 §2.1.2, DeepSeek-V3 §2.1.2)."""
    _require(config.moe_layer_freq >= 1, "moe_layer_freq", config.moe_layer_freq, "an integer of at least 1")
    _require(
        config.first_k_dense_replace >= 0,
        "first_k_dense_replace",
        config.first_k_dense_replace,
        "an integer of at least 0",
    )
    _require(
        config.topk_method in TOPK_METHODS,
        "topk_method",
        config.topk_method,
        f"one of {_names(TOPK_METHODS)}",
    )
    _require(
        config.scoring_func in SCORING_FUNCTIONS,
        "scoring_func",
        config.scoring_func,
        f"one of {_names(SCORING_FUNCTIONS)}",
    )
    for field in ("aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha"):
        _require(getattr(config, field) >= 0, field, getattr(config, field), "a number of at least 0")
    factor = config.expert_capacity_factor
    _require(
        factor is None or factor > 0,
        "expert_capacity_factor",
        factor,
        "a number above 0, or None to drop no token",
    )
    if config.n_routed_experts is None:
        return

    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    _require(experts >= 1, "n_routed_experts", experts, "an integer of at least 1, or None for a dense model")
    _require(
        top_k is not None and 1 <= top_k <= experts,
        "num_experts_per_tok",
        top_k,
        f"1 to `n_routed_experts` ({experts})",
    )
    _require(
        config.n_shared_experts is None or config.n_shared_experts >= 0,
        "n_shared_experts",
        config.n_shared_experts,
        "an integer of at least 0, or None",
    )
    if config.topk_method != "greedy":
        _check_groups(config)
    devices = config.n_expert_devices
    _require(
        devices is None or (devices >= 1 and experts % devices == 0),
        "n_expert_devices",
        devices,
        f"a divisor of `n_routed_experts` ({experts}), or None for one device per routing group",
    )


def _check_groups(config: DeepseekConfigBase) -> None:
    experts, groups, topk_group = config.n_routed_experts, config.n_group, config.topk_group
    _require(
        groups is not None and groups >= 1 and experts % groups == 0,
        "n_group",
        groups,
        f"a divisor of `n_routed_experts` ({experts}), as `topk_method` is {config.topk_method!r}",
    )
    _require(
        topk_group is not None and 1 <= topk_group <= groups,
        "topk_group",
        topk_group,
        f"1 to `n_group` ({groups})",
    )
    per_group = experts // groups
    _require(
        config.num_experts_per_tok <= topk_group * per_group,
        "num_experts_per_tok",
        config.num_experts_per_tok,
        f"at most {topk_group * per_group}, what {topk_group} chosen groups of {per_group} experts offer",
    )
    if config.topk_method == "noaux_tc":
        _require(
            per_group >= 2,
            "n_group",
            groups,
            f"at most {experts // 2}: `noaux_tc` scores a group by its two best experts, so each needs two",
        )


def check_multi_token_prediction(config: DeepseekConfigBase) -> None:
    """DeepSeek-V3 §2.2."""
    depth, weight = config.num_nextn_predict_layers, config.mtp_loss_weight
    _require(depth >= 0, "num_nextn_predict_layers", depth, "the number of MTP layers, an integer of at least 0")
    _require(weight >= 0, "mtp_loss_weight", weight, "a number of at least 0")
