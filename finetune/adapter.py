"""The low-rank adapter of a DeepSeek model (LoRA, Hu et al. 2021, arXiv 2106.09685), made by PEFT.

Presets say what is adapted without naming parameters. None but `all+mtp` touches the multi-token-prediction layers:
transformers' own classes lack them, and PEFT would load an adapter that names them there without a word about what it
leaves out.
"""

import dataclasses
import difflib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

# What each preset adapts. `experts` are the routed ones; `dense` is the MLP of the layers without experts, `mtp` the
# projection that joins the two inputs of a multi-token-prediction layer.
PRESETS = {
    "attention": {"attention"},
    "experts": {"experts"},
    "shared_experts": {"shared_experts"},
    "all": {"attention", "dense", "shared_experts", "experts"},
    "all+mtp": {"attention", "dense", "shared_experts", "experts", "mtp"},
    "router": {"router"},
}
# PEFT adapts parameters that no `nn.Linear` holds, and accepts for them only these values of what it offers for
# modules (0.21.2, `tuners/lora/layer.py`: `ParamWrapper`).
_FOR_PARAMETERS = {
    "lora_dropout": (0.0,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian"),
}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def kind_of(name: str) -> str:
    """Which part of a decoder layer the parameter or module `name` belongs to, in the words of `PRESETS`."""
    for part, kind in (
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.shared_experts.", "shared_experts"),
        (".mlp.gate.", "router"),
        (".mlp.", "dense"),
        (".eh_proj.", "mtp"),
    ):
        if part in f"{name}.":
            return kind
    return "other"


def adapter_config(model: PreTrainedModel, r: int, alpha: int, targets: Sequence[str], **peft_arguments) -> LoraConfig:
    """The PEFT configuration of the presets `targets`.

    Args:
        r: rank of the adapter's matrices. On the routed experts each expert gets its own.
        alpha: the adapter's output is scaled by `alpha / r`.
        targets: of `PRESETS`.
        peft_arguments: any other argument of `LoraConfig`; it wins over what the presets say.

    Raises:
        ValueError: a preset is unknown, or meant for layers that the model has not; a PEFT argument is unknown, or not
            possible for the parameters among the targets.
    """
    if unknown := set(targets) - PRESETS.keys():
        raise ValueError(f"lora_targets={sorted(unknown)}; accepted: {', '.join(PRESETS)}.")
    kinds = set().union(*(PRESETS[preset] for preset in targets))
    config, layers = model.config, list(model.model.layers)
    if "mtp" not in kinds:
        layers = layers[: config.num_hidden_layers]

    chosen_only = getattr(model, "expert_config", None) is not None  # see `esft.py`
    modules, parameters, found = set(), [], set()
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        for name, module in layer.named_modules():
            kind = kind_of(f"{prefix}.{name}")
            if kind in kinds & {"attention", "mtp"} and isinstance(module, nn.Linear):
                modules.add(name.rpartition(".")[-1])
                found.add(kind)
        # MLPs too, by the full names of their weights: given as modules, PEFT 0.21 takes every gate_proj, up_proj and
        # down_proj of a DeepSeek model for the routed experts' (huggingface/peft#3711).
        for name, _ in layer.mlp.named_parameters():
            kind = kind_of(f"{prefix}.mlp.{name}")
            if kind in kinds and (kind != "experts" or not chosen_only or ".specialized_" in name):
                parameters.append(f"{prefix}.mlp.{name}")
                found.add(kind)
    for preset, kind, field in (
        ("experts", "experts", "n_routed_experts"),
        ("router", "router", "n_routed_experts"),
        ("shared_experts", "shared_experts", "n_shared_experts"),
        ("all+mtp", "mtp", "num_nextn_predict_layers"),
    ):
        if preset in targets and kind not in found:
            raise ValueError(
                f"lora_targets: {preset} finds nothing to adapt, as the model's {field} is {getattr(config, field)}; "
                f"accepted: those of {', '.join(PRESETS)} that the model has."
            )
    if "router" in targets:
        warnings.warn(
            "lora_targets: router adapts who gets which token. That moves tokens away from the balance between experts "
            "that the base was trained to (watch max_vio), and to experts that have not seen their like.",
            stacklevel=2,
        )
    fields = {
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "layers_to_transform": list(range(len(layers))) if modules else None,
        "target_parameters": parameters,
        **peft_arguments,
    }
    _check_peft_arguments(fields)
    return LoraConfig(**fields)


def _check_peft_arguments(fields: dict[str, Any]) -> None:
    accepted = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name, value in fields.items():
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; accepted: {', '.join(accepted)}."
            raise ValueError(f"lora_config: PEFT's LoraConfig has no field {name!r}{hint}")
        possible = _FOR_PARAMETERS.get(name, (value,))
        if fields["target_parameters"] and value not in possible:
            raise ValueError(
                f"lora_config: {name}={value!r} is not possible for parameters like {fields['target_parameters'][0]}; "
                f"accepted: {', '.join(map(repr, possible))}, or lora_targets of attention alone."
            )


def add_adapter(model: PreTrainedModel, r: int, alpha: int, targets: Sequence[str], **peft_arguments) -> PeftModel:
    """Freezes `model` and adds a LoRA adapter that is trained in its place; see `adapter_config`."""
    return get_peft_model(model, adapter_config(model, r, alpha, targets, **peft_arguments))


def describe_adapter(model: PeftModel) -> str:
    """What the presets came to, in PEFT's terms, and how many parameters are trained in each part of the model."""
    config = model.peft_config["default"]
    parameters = Counter(_LAYER.sub(".layers.*.", f".{name}")[1:] for name in config.target_parameters or [])
    counts = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[kind_of(name)] += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters()) - sum(counts.values())
    lines = [f"LoRA, r={config.r}, lora_alpha={config.lora_alpha}"]
    if config.target_modules:
        lines.append(f"  target_modules: {', '.join(sorted(config.target_modules))}")
    lines += [f"  target_parameters: {name} ({count} layers)" for name, count in sorted(parameters.items())]
    lines += [f"  trained in {kind}: {count:,} parameters" for kind, count in sorted(counts.items())]
    return "\n".join([*lines, f"  in all: {sum(counts.values()):,}, {sum(counts.values()) / total:.2%} of the base"])


def load_adapter(model: PreTrainedModel, folder: str, **kwargs) -> PeftModel:
    """The adapter saved in `folder` on `model`, as `PeftModel.from_pretrained` (which takes `kwargs`), but checked.

    Raises:
        ValueError: the adapter's tensors are not those that it has on this model, as that of a model with other layers.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; accepted: the folder of a saved adapter.")
    with safe_open(path, "pt") as file:
        found = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 (not a dict)
    last = max((int(layer.group(1)) for layer in map(_LAYER.search, found) if layer), default=-1)
    num_layers = len(model.model.layers)
    if last >= num_layers:
        raise ValueError(
            f"{folder} adapts layer {last}, and the model ends with layer {num_layers - 1}; accepted: an adapter made "
            "for a model of as many layers."
        )
    adapted = PeftModel.from_pretrained(model, folder, **kwargs)
    wanted = {name for name in get_peft_model_state_dict(adapted) if "lora_" in name}
    if wanted != found:
        odd = sorted(wanted ^ found)
        raise ValueError(
            f"{folder} does not fit the model: {len(wanted - found)} of the adapter's tensors are missing in the file "
            f"and {len(found - wanted)} have no place in the model ({', '.join(odd[:4])}{', …' * (len(odd) > 4)}); "
            "accepted: an adapter made for a model of as many layers."
        )
    return adapted


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
