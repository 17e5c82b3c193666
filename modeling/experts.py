"""The experts of DeepSeekMoE §3 (arXiv 2401.06066): fine-grained routed experts beside shared ones.

Shapes: B batch, T tokens, N = B·T, H hidden, I expert's intermediate width, E routed experts, K experts a token.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase

from .balance import drop_tokens_over_capacity
from .expert_lora import ExpertLinear, ExpertLinears, LowRank, active_adapters, is_wrapped
from .projection import project
from .router import Router
from .swiglu import gated_activation


class MLP(nn.Module):
    """SwiGLU feed-forward, down(act(gate(x)) · up(x)): a dense layer, or the shared experts as one wide expert."""

    def __init__(self, config: DeepseekConfigBase, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = project(self.gate_proj, hidden_states), project(self.up_proj, hidden_states)
        return project(self.down_proj, gated_activation(self.act_fn, gate, up))


@use_experts_implementation
class RoutedExperts(nn.Module):
    """The routed experts, their weights fused: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    `forward` below is the plain reading, one expert after the other ("eager"). transformers' experts interface puts
    another one in its place where `experts_implementation` asks for it; by default "per_device".
    """

    def __init__(self, config: DeepseekConfigBase):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: dict[str, LowRank] | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [N, H], `top_k_index` [N, K], `top_k_weights` [N, K] → [N, H].

        An index of E marks a choice that another rank serves (expert parallelism). `adapters` are LoRA's, by the name
        of the parameter; see `expert_lora.py`.
        """
        # Sorted by expert, the choices of each are neighbours, and those of other ranks come last.
        choices = top_k_index.flatten()
        order = choices.argsort(stable=True)
        counts = torch.bincount(choices, minlength=self.num_experts).tolist()[: self.num_experts]
        chosen = [expert for expert, count in enumerate(counts) if count]
        order = order[: sum(counts)]
        token = order // top_k_index.shape[1]
        gate_up_projs, down_projs = (self.projections(name, adapters or {}) for name in ("gate_up_proj", "down_proj"))
        output = torch.zeros_like(hidden_states)
        sizes = [counts[expert] for expert in chosen]
        weights = top_k_weights.flatten()[order].unsqueeze(-1)
        # `index_select` and not [token]: its gradient adds whole rows up, six times as fast.
        states = hidden_states.index_select(0, token).split(sizes)
        runs = zip(chosen, states, weights.split(sizes), token.split(sizes), strict=True)
        for expert, states_of_expert, weight, rows in runs:
            gate, up = gate_up_projs[expert](states_of_expert).chunk(2, dim=-1)
            weighted = down_projs[expert](gated_activation(self.act_fn, gate, up)) * weight
            output.index_add_(0, rows, weighted.to(output.dtype))
        return output

    def projections(self, name: str, adapters: dict[str, LowRank]) -> Sequence[ExpertLinear]:
        """Every expert's `name`, "gate_up_proj" or "down_proj"."""
        return ExpertLinears(getattr(self, name), adapters.get(name))


def per_device_experts_forward(
    experts: RoutedExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The fastest way to pass the routed experts, as `RoutedExperts.forward`: on a CPU one expert after the other; on
    an accelerator, where each of many small products would wait to be launched, and in compiled code, which cannot
    loop over counts that it does not know, transformers' grouped products. An accelerator that decodes takes its
    batched ones, which copy the weights of every choice: at most as much as the layer's experts weigh."""
    on_cpu = hidden_states.device.type == "cpu"
    if on_cpu and not torch.compiler.is_compiling():
        return plain_forward(experts, hidden_states, top_k_index, top_k_weights)
    if not on_cpu and not torch.is_grad_enabled() and top_k_index.numel() <= experts.num_experts:
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, hidden_states, top_k_index, top_k_weights)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)


plain_forward = inspect.unwrap(RoutedExperts.forward)  # past the experts interface
ExpertsInterface.register("per_device", per_device_experts_forward)


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE's feed-forward: every token passes the shared experts and K routed ones (eq. 9 of the V1 paper)."""

    def __init__(self, config: DeepseekConfigBase):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states` [B, T, H], `token_mask` [B, T] (True for real tokens; `None`: all are) →
        `(output [B, T, H], router_logits [N, E], topk_index [N, K])`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits, topk_weight, topk_index = self.gate(hidden_states)
        if self.training and self.config.expert_capacity_factor is not None:
            mask = None if token_mask is None else token_mask.flatten()
            topk_weight = drop_tokens_over_capacity(self.config, topk_weight, topk_index, mask)
        output = self.pass_routed(flat, topk_index, topk_weight).view_as(hidden_states)
        if self.config.n_shared_experts:
            output = output + self.shared_experts(hidden_states)
        return output, router_logits, topk_index

    @property
    def router(self) -> Router:
        """The router itself, also where PEFT has wrapped `gate`."""
        return self.gate.get_base_layer() if is_wrapped(self.gate) else self.gate

    def pass_routed(self, flat: torch.Tensor, topk_index: torch.Tensor, topk_weight: torch.Tensor) -> torch.Tensor:
        """What the routed experts make of `flat` [N, H], [N, H]; LoRA on them is computed with its factors."""
        adapters = active_adapters(self.experts)
        if not adapters or not isinstance(self.experts.get_base_layer(), RoutedExperts):
            return self.experts(flat, topk_index, topk_weight)
        # The experts interface knows no adapters.
        return plain_forward(self.experts.get_base_layer(), flat, topk_index, topk_weight, adapters)
