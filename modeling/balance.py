"""Keeping the experts in balance: the auxiliary losses of DeepSeekMoE §3.3, DeepSeek-V2 §2.1.3 and DeepSeek-V3 §2.1.2,
and the dropping of tokens over capacity of DeepSeek-V2 §2.1.4.

Shapes: B sequences, T tokens, E routed experts, K experts a token, D devices that the experts are spread over.

Every loss is α·Σ_i f_i·P_i. f_i is the share of the tokens' choices that fell on i (a count, without gradient), scaled
so that perfect balance gives 1; P_i is the mean affinity to i (which carries the gradient). Pushing down P where f is
high moves tokens away from crowded experts. The losses differ in what i is:

- expert-level (α₁, `aux_loss_alpha`): i is an expert;
- device-level (α₂, `device_aux_loss_alpha`): i is a device, holding E/D experts;
- communication (α₃, `comm_aux_loss_alpha`): i is a device, f_i the share of tokens that are sent to it at all.

With `seq_aux` f and P are taken within each sequence and the losses averaged over sequences; otherwise over the batch.
"""

import math
from typing import NamedTuple

import torch

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase

from .router import routing_scores


class Routing(NamedTuple):
    """How one layer routed: `router_logits` [B·T, E], `topk_index` [B·T, K] (the experts chosen), and `token_mask`
    [B, T], True for the tokens that count (`None`: all do)."""

    router_logits: torch.Tensor
    topk_index: torch.Tensor
    token_mask: torch.Tensor | None


def num_expert_devices(config: DeepseekConfigBase) -> int:
    """D: `n_expert_devices`, else one device per routing group, else one."""
    return config.n_expert_devices or config.n_group or 1


def max_devices_of_token(config: DeepseekConfigBase) -> int:
    """M: on how many devices the K experts of a token can lie, given that they come from `topk_group` groups."""
    devices = num_expert_devices(config)
    reachable = min(devices, config.num_experts_per_tok)
    if config.topk_method == "greedy":
        return reachable
    devices_of_group = math.ceil(devices / config.n_group)
    return min(reachable, config.topk_group * devices_of_group)


def balance_loss(
    config: DeepseekConfigBase, routing: Routing, batch_size: int, sequence_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted sum of the three balance losses of one layer, a float32 scalar.

    Args:
        routing: of this layer; padding counts nowhere.
        batch_size: B.
        sequence_weight: [B], each sequence's weight in the average over sequences; `None` weighs alike all sequences
            that hold a real token. Without `seq_aux` its sum weighs the batch.
    """
    router_logits, topk_index, token_mask = routing
    scores = routing_scores(router_logits, config.scoring_func)
    if token_mask is None:
        token_mask = torch.ones(batch_size, scores.shape[0] // batch_size, dtype=torch.bool, device=scores.device)
    if config.scoring_func == "sigmoid":  # V3 eq. 20: affinities normalised over the experts, as softmax's already are
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    if sequence_weight is None:
        has_tokens = token_mask.any(dim=1).float()
        sequence_weight = has_tokens / has_tokens.sum().clamp(min=1)
    sequence_weight = sequence_weight.to(scores.device)

    rows = batch_size if config.seq_aux else 1
    mask = token_mask.reshape(rows, -1, 1).float()
    scores = scores.reshape(rows, -1, config.n_routed_experts)
    favoured = topk_index
    if config.topk_method == "noaux_tc":  # V3 eq. 18: the K highest affinities, whatever bias and group limit chose
        favoured = scores.topk(config.num_experts_per_tok, dim=-1).indices
    tokens = mask.sum(dim=1).clamp(min=1)  # [rows, 1]
    row_weight = sequence_weight.float() if config.seq_aux else sequence_weight.float().sum(dim=0, keepdim=True)

    def mean_over_tokens(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum(dim=1) / tokens

    def choices(index: torch.Tensor) -> torch.Tensor:  # [rows, tokens, E], 1 where chosen
        return torch.zeros_like(scores).scatter_(2, index.reshape(*scores.shape[:2], -1), 1.0)

    per_choice = config.n_routed_experts / config.num_experts_per_tok
    f = mean_over_tokens(choices(favoured)) * per_choice  # [rows, E]
    p = mean_over_tokens(scores)  # [rows, E]
    loss = config.aux_loss_alpha * (f * p).sum(dim=-1)

    devices = num_expert_devices(config)
    if config.device_aux_loss_alpha or config.comm_aux_loss_alpha:
        p_device = p.unflatten(-1, (devices, -1)).sum(dim=-1)  # [rows, D]
        f_device = f.unflatten(-1, (devices, -1)).mean(dim=-1)
        loss = loss + config.device_aux_loss_alpha * (f_device * p_device).sum(dim=-1)
        sent = choices(topk_index).unflatten(-1, (devices, -1)).amax(dim=-1)  # [rows, tokens, D]
        f_sent = mean_over_tokens(sent) * devices / max_devices_of_token(config)
        loss = loss + config.comm_aux_loss_alpha * (f_sent * p_device).sum(dim=-1)
    return (loss * row_weight).sum()


def drop_tokens_over_capacity(
    config: DeepseekConfigBase,
    topk_weight: torch.Tensor,
    topk_index: torch.Tensor,
    token_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Zeroes the weights of the choices that exceed a device's capacity; returns them, [N, K].

    A device takes `expert_capacity_factor` times its even share of the choices of the real tokens and keeps those with
    the highest weights (DeepSeek-V2 §2.1.4, device-level token dropping). `token_mask` [N], True for real tokens.
    """
    devices = num_expert_devices(config)
    device = topk_index.flatten() // (config.n_routed_experts // devices)  # [N·K]
    real = torch.ones_like(device, dtype=torch.bool)
    if token_mask is not None:
        real = token_mask.repeat_interleave(topk_index.shape[1])
        device = device.masked_fill(~real, devices)  # padding queues up behind a device that does not exist
    capacity = math.ceil(config.expert_capacity_factor * int(real.sum()) / devices)

    # Place of each choice in its device's queue, the heaviest first.
    by_weight = topk_weight.detach().flatten().argsort(descending=True, stable=True)
    order = by_weight[device[by_weight].argsort(stable=True)]
    first = torch.bincount(device, minlength=devices + 1).cumsum(0).roll(1)
    first[0] = 0
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - first[device[order]]
    return topk_weight * (place < capacity).reshape_as(topk_weight)
