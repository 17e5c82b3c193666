"""Adapters with one LoRA an expert, as vLLM and SGLang read them, from and to PEFT's files with fused experts.

Shapes: E experts, r rank of one expert's matrices, I expert's intermediate width.

    PEFT   …mlp.experts.base_layer.lora_A.weight  [E·r, in]   gate_up_proj, if down_proj has an adapter too
           …mlp.experts.lora_A.weight             [E·r, in]   down_proj, or the only one
    engine …mlp.experts.<i>.gate_proj.lora_A.weight  [r, in]  and so on for up_proj and down_proj

and lora_B likewise, [out, r·E] with the expert running fastest, against [out, r]. The fused gate_up_proj has one lora_A
for both halves, so gate_proj and up_proj get the same. Engines scale by lora_alpha / r alone: what patterns of ranks
and alphas or rank-stabilised LoRA make of that is multiplied into lora_B.
"""

import copy
import math
import re
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from .esft import EXPERT_CONFIG_NAME, ExpertConfig

_PREFIX = "base_model.model."
_FUSED = re.compile(r"^(?P<experts>.*\.layers\.(?P<layer>\d+)\.mlp\.experts)\.(?P<inner>base_layer\.)?lora_A\.weight$")
_SINGLE = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<id>\d+)\.(?P<projection>\w+)\.lora_A\.weight$")
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
# PEFT takes these modules of a DeepSeek model for the routed experts' (see `adapter.py`), so it gets their weights.
_BY_PARAMETER = re.compile(r"\.mlp\.(gate|(shared_experts\.)?(gate|up|down)_proj)$")


def _read(folder: str | Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    return LoraConfig.from_pretrained(folder), load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)


def _write(config: LoraConfig, tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(folder)


def _rank_and_scaling(config: LoraConfig, target: str) -> tuple[int, float]:
    """Rank and scaling of the module or parameter `target`, as PEFT finds them."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, target), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, target), config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def export_per_expert(folder: str | Path, target: str | Path) -> None:
    """Writes the PEFT adapter in `folder` to `target` with one LoRA an expert.

    Of an adapter that ESFT trained (`expert_cfg.json` beside it) only the chosen experts have one.

    Raises:
        ValueError: the adapter has none on routed experts.
    """
    config, tensors = _read(folder)
    names = {name.rpartition(".")[2] for name in config.target_parameters or [] if ".experts." in f".{name}"}
    chosen = None
    if (Path(folder) / EXPERT_CONFIG_NAME).is_file():
        chosen = ExpertConfig.read(Path(folder) / EXPERT_CONFIG_NAME).experts
    pairs = {}  # module → lora_A, lora_B, scaling
    for name in list(tensors):
        if not name.endswith(_LORA_A):
            continue
        lora_a, lora_b = tensors.pop(name), tensors.pop(name.removesuffix(_LORA_A) + _LORA_B)
        fused = _FUSED.match(name)
        if fused is None:
            module = name.removesuffix(_LORA_A)
            key = module.removeprefix(_PREFIX)
            _, scaling = _rank_and_scaling(config, f"{key}.weight" if _BY_PARAMETER.search(key) else key)
            pairs[module] = lora_a, lora_b, scaling
            continue
        is_gate_up = fused["inner"] is not None or not any(name.endswith("down_proj") for name in names)
        parameter = next(n for n in names if n.endswith("gate_up_proj" if is_gate_up else "down_proj"))
        r, scaling = _rank_and_scaling(config, f"{fused['experts'].removeprefix(_PREFIX)}.{parameter}")
        lora_a = lora_a.unflatten(0, (-1, r))  # [E, r, in]
        lora_b = lora_b.unflatten(1, (r, -1)).permute(2, 0, 1)  # [E, out, r]
        names_of = ("gate_proj", "up_proj") if is_gate_up else ("down_proj",)
        projections = zip(names_of, lora_b.chunk(len(names_of), dim=1), strict=True)
        ids = range(len(lora_a)) if chosen is None else chosen[int(fused["layer"])]
        for projection, b in projections:
            for row, expert in enumerate(ids):
                pairs[f"{fused['experts']}.{expert}.{projection}"] = lora_a[row].clone(), b[row], scaling
    if not any(".mlp.experts." in module for module in pairs):
        raise ValueError(f"{folder} adapts no routed experts; accepted: an adapter whose target_parameters name them.")

    rank = max(len(lora_a) for lora_a, _, _ in pairs.values())
    for module, (lora_a, lora_b, scaling) in pairs.items():
        tensors[module + _LORA_A] = lora_a
        tensors[module + _LORA_B] = lora_b * (scaling * rank / config.lora_alpha)
    config = copy.copy(config)
    config.r, config.use_rslora, config.rank_pattern, config.alpha_pattern = rank, False, {}, {}
    config.target_modules = sorted({module.rpartition(".")[2] for module in pairs})
    config.target_parameters = config.layers_to_transform = None
    _write(config, tensors, target)


def import_per_expert(folder: str | Path, target: str | Path, num_experts: int) -> None:
    """Writes the adapter in `folder`, which has one LoRA an expert, to `target` for PEFT.

    Experts without one get zeros. Where gate_proj and up_proj have a lora_A of their own, the fused rank is the sum of
    both.

    Args:
        num_experts: E, the model's `n_routed_experts`.

    Raises:
        ValueError: the adapter names an expert beyond E, or a projection that experts have not.
    """
    config, tensors = _read(folder)
    scaling = _rank_and_scaling(config, "")[1]
    layers: dict[str, dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in list(tensors):
        if not (single := _SINGLE.match(name)):
            continue
        projection, expert = single["projection"], int(single["id"])
        if expert >= num_experts or projection not in ("gate_proj", "up_proj", "down_proj"):
            raise ValueError(
                f"{folder}: {name}; accepted: gate_proj, up_proj and down_proj of the experts 0 to {num_experts - 1}."
            )
        pair = tensors.pop(name), tensors.pop(name.removesuffix(_LORA_A) + _LORA_B)
        layers.setdefault(single["experts"], {})[projection, expert] = pair

    all_pairs = [pair for layer in layers.values() for pair in layer.values()]
    rank = max((len(a) for a, _ in all_pairs), default=config.r)
    has_down = any(projection == "down_proj" for layer in layers.values() for projection, _ in layer)
    has_gate_up = any(projection != "down_proj" for layer in layers.values() for projection, _ in layer)
    shares_a = all(
        ("gate_proj", expert) in layer
        and ("up_proj", expert) in layer
        and torch.equal(layer["gate_proj", expert][0], layer["up_proj", expert][0])
        for layer in layers.values()
        for projection, expert in layer
        if projection != "down_proj"
    )

    parameters, ranks = [], {}
    for experts, layer in layers.items():
        if has_gate_up:
            fused = _fuse(layer, ("gate_proj", "up_proj"), num_experts, rank, shares_a)
            _add_fused(tensors, f"{experts}.base_layer" if has_down else experts, fused)
            ranks["mlp.experts.gate_up_proj"] = rank if shares_a else 2 * rank
            parameters.append(f"{experts.removeprefix(_PREFIX)}.gate_up_proj")
        if has_down:
            _add_fused(tensors, experts, _fuse(layer, ("down_proj",), num_experts, rank, True))
            ranks["mlp.experts.down_proj"] = rank
            parameters.append(f"{experts.removeprefix(_PREFIX)}.down_proj")
    others = []
    for name, tensor in tensors.items():
        if name.endswith(_LORA_A) and ".mlp.experts." not in name:
            module = name.removeprefix(_PREFIX).removesuffix(_LORA_A)
            others.append(f"{module}.weight" if _BY_PARAMETER.search(module) else module)
            ranks[others[-1]] = len(tensor)

    config = copy.copy(config)
    config.use_rslora, config.lora_alpha = False, scaling * config.r
    config.rank_pattern = {name: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = {name: scaling * r for name, r in config.rank_pattern.items()}
    config.target_modules = sorted(name for name in others if not name.endswith(".weight"))
    config.target_parameters = parameters + sorted(name for name in others if name.endswith(".weight"))
    _write(config, tensors, target)


def _fuse(
    layer: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]],
    projections: tuple[str, ...],
    num_experts: int,
    rank: int,
    shares_a: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [E, R, in] and lora_B [E, out, R] of a layer's `projections`, one below the other in the output; with
    `shares_a` R is `rank`, otherwise each projection has as many rows of its own."""
    like_a, like_b = next(pair for (projection, _), pair in layer.items() if projection in projections)
    out, columns = len(like_b), rank if shares_a else rank * len(projections)
    lora_a = like_a.new_zeros(num_experts, columns, like_a.shape[1])
    lora_b = like_b.new_zeros(num_experts, out * len(projections), columns)
    for (projection, expert), (a, b) in layer.items():
        if projection in projections:
            place = projections.index(projection)
            first = 0 if shares_a else place * rank
            lora_a[expert, first : first + len(a)] = a
            lora_b[expert, place * out : (place + 1) * out, first : first + len(a)] = b
    return lora_a, lora_b


def _add_fused(tensors: dict[str, torch.Tensor], module: str, fused: tuple[torch.Tensor, torch.Tensor]) -> None:
    lora_a, lora_b = fused
    tensors[module + _LORA_A] = lora_a.flatten(0, 1)
    tensors[module + _LORA_B] = lora_b.permute(1, 2, 0).flatten(1)
