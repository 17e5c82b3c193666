"""The router of DeepSeekMoE: which experts a token goes to, and with which weight.

Shapes: N tokens (batch and time flattened), H hidden, E routed experts, K experts a token, G routing groups.

Three methods (`topk_method`), one a paper:

- `greedy`: the K best scores. DeepSeekMoE §3 (arXiv 2401.06066); V1 and V2-Lite.
- `group_limited_greedy`: the K best scores within the best `topk_group` groups, a group scoring as its best expert.
  With one group a device this is the device-limited routing of DeepSeek-V2 §2.1.2 (arXiv 2405.04434).
- `noaux_tc`: as above on scores shifted by a per-expert bias, a group scoring as the sum of its two best experts. The
  bias only chooses; the weight comes from the unshifted score. DeepSeek-V3 §2.1.2 (arXiv 2412.19437).

All scores are float32, whatever the model's dtype: near-ties would otherwise be decided by rounding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase


def routing_scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Affinity s_{i,t} of token t to expert i, float32: `router_logits` [..., E] → scores [..., E] in (0, 1)."""
    logits = router_logits.float()
    return logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=-1)


class Router(nn.Module):
    """The gate of a mixture of experts; `mlp.gate` in the checkpoints.

    `e_score_correction_bias` [E] (float32, only with `noaux_tc`) is the bias b_i of auxiliary-loss-free balancing. It
    has no gradient: `update_bias` shifts it between optimizer steps by the load counted in `expert_load`.
    """

    def __init__(self, config: DeepseekConfigBase):
        super().__init__()
        self.config = config
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts))
        # Not a buffer: data-parallel wrappers overwrite buffers with rank 0's at every forward; loads differ by rank.
        self.expert_load: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states` [..., H], N tokens → `(router_logits [N, E], topk_weight [N, K], topk_index [N, K])`."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = F.linear(hidden_states.float(), self.weight.float())
        scores = routing_scores(router_logits, self.config.scoring_func)
        topk_index = self.choose(scores)
        return router_logits, self.weigh(scores.gather(1, topk_index)), topk_index

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices [N, K] of the experts chosen from `scores` [N, E]."""
        method = self.config.topk_method
        if method == "noaux_tc":
            candidates = self._limit_to_groups(scores + self.e_score_correction_bias.float(), best_of_group=2)
        elif method == "group_limited_greedy":
            candidates = self._limit_to_groups(scores, best_of_group=1)
        else:
            candidates = scores
        return candidates.topk(self.top_k, dim=-1, sorted=False).indices

    def _limit_to_groups(self, scores: torch.Tensor, best_of_group: int) -> torch.Tensor:
        """`scores` [N, E] with the experts outside the `topk_group` best groups at -inf; a group scores as the sum of
        its `best_of_group` best experts."""
        groups = scores.unflatten(-1, (self.config.n_group, -1))  # [N, G, E/G]
        group_scores = groups.topk(best_of_group, dim=-1).values.sum(dim=-1)  # [N, G]
        chosen = group_scores.topk(self.config.topk_group, dim=-1, sorted=False).indices
        left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        return groups.masked_fill(left_out.unsqueeze(-1), float("-inf")).flatten(-2)

    def weigh(self, topk_scores: torch.Tensor) -> torch.Tensor:
        """Scores of the chosen experts [N, K] → the weights [N, K] of their outputs.

        V1 and V2 either normalise or scale; V3 does both, in that order.
        """
        normalise = self.config.norm_topk_prob and self.top_k > 1
        if normalise:
            topk_scores = topk_scores / (topk_scores.sum(dim=-1, keepdim=True) + 1e-20)
        if not normalise or self.config.topk_method == "noaux_tc":
            topk_scores = topk_scores * self.config.routed_scaling_factor
        return topk_scores

    def count_load(self, topk_index: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """Adds the choices `topk_index` [N, K] of the real tokens (`token_mask` [N]) to `expert_load`."""
        choice = torch.ones_like(topk_index)
        if token_mask is not None:
            choice = choice * token_mask.to(choice.device).unsqueeze(1)
        load = choice.new_zeros(self.num_experts).scatter_add_(0, topk_index.flatten(), choice.flatten())
        self.expert_load = load if self.expert_load is None else self.expert_load.to(load.device) + load

    @torch.no_grad()
    def update_bias(self, load: torch.Tensor, speed: float) -> None:
        """b_i ← b_i + γ·sign(mean load - load_i): DeepSeek-V3 §2.1.2, arXiv 2408.15664 algorithm 1.

        `load` [E] counts tokens an expert; `speed` is γ, in units of the score (0.001 in DeepSeek-V3).
        """
        bias = self.e_score_correction_bias
        load = load.to(bias.device, torch.float32)
        # `model.bfloat16()` casts the bias too, and would lose steps this small: it goes on in float32.
        bias.data = bias.float() + speed * torch.sign(load.mean() - load)
