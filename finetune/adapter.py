"""The low-rank adapter of a DeepSeek model (LoRA, Hu et al. 2021, arXiv 2106.09685), made by PEFT.

The router (`mlp.gate`) and the multi-token-prediction layers stay as they are. transformers' own classes lack
those layers, and PEFT would load an adapter that names them there without a word about what it leaves out.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, r: int, alpha: int, targets: Sequence[str]) -> PeftModel:
    """Freezes `model` and adds a LoRA adapter that is trained in its place.

    Args:
        r: rank of the adapter's matrices. On the routed experts each expert gets its own.
        alpha: the adapter's output is scaled by `alpha / r`.
        targets: any of `"attention"`, `"mlp"` (dense MLPs and shared experts), `"experts"` (routed experts).
    """
    modules, parameters = set(), []
    for index, layer in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        if "attention" in targets:
            modules |= {name for name, module in layer.self_attn.named_modules() if isinstance(module, nn.Linear)}
        for name, _ in layer.mlp.named_parameters():
            kind = "experts" if name.startswith("experts.") else "router" if name.startswith("gate.") else "mlp"
            if kind in targets:
                parameters.append(f"model.layers.{index}.mlp.{name}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        target_modules=sorted(modules),
        layers_to_transform=list(range(model.config.num_hidden_layers)),
        # MLPs by the full names of their weights: given as modules, PEFT 0.21 takes every gate_proj, up_proj and
        # down_proj of a DeepSeek model for the routed experts' (huggingface/peft#3711).
        target_parameters=parameters,
    )
    return get_peft_model(model, config)


def check_same_base(checkpoint: str, model: PeftModel) -> None:
    """Checks that the adapter saved in `checkpoint` belongs to `model`, base and all, before it is resumed.

    Raises:
        ValueError: the two differ in their base model, rank, scale or targets.
    """
    saved = json.loads((Path(checkpoint) / CONFIG_NAME).read_text())
    current = model.peft_config["default"].to_dict()
    for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "target_parameters"):
        ours, theirs = current[key], saved[key]
        if key == "base_model_name_or_path":
            same = os.path.realpath(ours) == os.path.realpath(theirs)
        else:
            same = ours == theirs or (isinstance(theirs, list) and set(ours) == set(theirs))
        if not same:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its adapter has {key}={theirs}, and this run {ours}."
            )
