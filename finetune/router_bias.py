"""Load balancing without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, section 2.1.2).

A router with `topk_method="noaux_tc"` adds a bias to each expert's score when it chooses, and only then.
The bias is no parameter: it gets no gradient. After every optimizer step it moves by a fixed amount, up for
the experts that saw fewer tokens than the mean and down for those that saw more. The model counts the loads
and moves the biases (`update_router_bias`); the callback below calls it at the right moment and reports how
balanced the experts were.
"""

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside what accelerate (DDP, FSDP, compile) and PEFT may have put around it."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def max_violation(load: torch.Tensor) -> torch.Tensor:
    """MaxVio of arXiv 2408.15664: how far the busiest expert is above the mean, `max(load) / mean(load) - 1`.

    Args:
        load (`[n_routed_experts]`): tokens that each expert received.

    Returns:
        A float scalar: 0 when all loads are equal, `n_routed_experts / num_experts_per_tok - 1` when every
        token chooses the same experts, NaN when no token was routed at all.
    """
    load = load.float()
    return load.max() / load.mean() - 1


class RouterBiasCallback(TrainerCallback):
    """Moves the routers' selection biases after each optimizer step; logs `max_vio` beside the training loss.

    `max_vio` is the max-violation of one optimizer step (its micro-batches and all data-parallel ranks
    together), averaged over the MoE layers and over the steps since the last log.

    Args:
        speed (`float`): by how much a bias moves in one step (DeepSeek-V3: 0.001 for most of its
            pre-training). 0.0 leaves the biases as they are and only reports `max_vio`.

    Raises:
        ValueError: for a negative `speed`; and when training begins, if `speed` is above zero and the model
            has no router bias to move.
    """

    def __init__(self, speed: float):
        if speed < 0:
            raise ValueError(f"router_bias_speed={speed} must be 0.0 (leave the biases alone) or above.")
        self.speed = speed
        self._violations: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        config = unwrap(model).config
        if self.speed > 0 and config.topk_method != "noaux_tc":
            raise ValueError(
                f"router_bias_speed={self.speed}: this model's routers (topk_method={config.topk_method!r}) have no "
                "bias; set router_bias_speed to 0.0 or use a model with topk_method='noaux_tc'."
            )

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model = unwrap(model)
        loads = model.update_router_bias(self.speed) if self.speed else model.collect_expert_load()
        # Kept as tensors: reading them here would wait for the accelerator at every step.
        self._violations += [max_violation(load) for load in loads.values()]

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs or not self._violations:
            return  # an evaluation's log, or a model without experts
        # The progress bar comes after this callback and prints `logs`; the history holds its own copy.
        logs["max_vio"] = torch.stack([violation.cpu() for violation in self._violations]).mean().item()
        state.log_history[-1]["max_vio"] = logs["max_vio"]
        self._violations.clear()
