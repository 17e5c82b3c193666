"""Expert-Specialized Fine-Tuning (ESFT, arXiv 2407.01906): only the experts that a task uses are trained.

Shapes: E routed experts, C chosen ones of a layer, H hidden, I expert's intermediate width.

The routed experts' weights are fused, [E, …], and a tensor is trained as a whole or not at all. So the chosen experts
get weights of their own, [C, …], which gradients and optimizer states belong to; the fused ones stay frozen.
"""

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase
from deepseek_hf.modeling.expert_lora import ExpertLinear, ExpertLinears, LowRank
from deepseek_hf.modeling.experts import RoutedExperts

from .adapter import kind_of

EXPERT_CONFIG_NAME = "expert_cfg.json"


@dataclass(frozen=True)
class ExpertConfig:
    """Which experts are trained, by layer index, and whether the shared experts and all that is no expert are too.

    On disk as published with ESFT: `{"experts": {"1": [8, 26], …}, "shared_experts": false, "non_expert_modules":
    false}`.
    """

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    @classmethod
    def read(cls, path: str | Path) -> "ExpertConfig":
        """Raises `ValueError` where the file is not of that form."""
        try:
            fields = json.loads(Path(path).read_text())
            experts = {
                int(layer): [int(expert) for expert in chosen] for layer, chosen in fields.pop("experts").items()
            }
            return cls(experts, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'{path} does not name experts ({error!r}); accepted: {{"experts": {{"<layer>": [<expert>, …], …}}, '
                '"shared_experts": false, "non_expert_modules": false}.'
            ) from None

    def write(self, folder: str | Path) -> None:
        fields = {**asdict(self), "experts": {str(layer): chosen for layer, chosen in self.experts.items()}}
        (Path(folder) / EXPERT_CONFIG_NAME).write_text(json.dumps(fields))

    def check(self, config: DeepseekConfigBase) -> None:
        """Raises `ValueError` where it names a layer or an expert that a model of `config` has not."""
        if not any(self.experts.values()):
            raise ValueError("expert_config names no expert; accepted: at least one in one layer.")
        mixtures = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
        for layer, chosen in self.experts.items():
            if layer not in mixtures:
                accepted = f"{mixtures[0]} to {mixtures[-1]}" if mixtures else "none, as all are dense"
                raise ValueError(
                    f"expert_config: layer {layer} has no routed experts (num_hidden_layers is "
                    f"{config.num_hidden_layers}, first_k_dense_replace {config.first_k_dense_replace}); accepted "
                    f"layers: {accepted}."
                )
            for expert in chosen:
                if not 0 <= expert < config.n_routed_experts or chosen.count(expert) > 1:
                    what = "twice" if chosen.count(expert) > 1 else "out of range"
                    raise ValueError(
                        f"expert_config: layer {layer}, expert {expert} is {what}; accepted: each of 0 to "
                        f"{config.n_routed_experts - 1} once."
                    )


class SpecializedExperts(RoutedExperts):
    """Routed experts of which `chosen` compute with weights of their own: `specialized_gate_up_proj` [C, 2I, H] and
    `specialized_down_proj` [C, H, I], copies to begin with. The fused weights are those of `experts`, frozen."""

    def __init__(self, experts: RoutedExperts, chosen: list[int]):
        with torch.device("meta"):  # its weights are replaced at once
            super().__init__(experts.config)
        self.chosen = chosen
        for name in ("gate_up_proj", "down_proj"):
            fused = getattr(experts, name).requires_grad_(False)
            setattr(self, name, fused)
            setattr(self, f"specialized_{name}", nn.Parameter(fused.detach()[chosen]))

    # One expert after the other: the experts interface would compute with the fused weights alone.
    forward = inspect.unwrap(RoutedExperts.forward)

    def projections(self, name: str, adapters: dict[str, LowRank]) -> list[ExpertLinear]:
        projections = list(super().projections(name, adapters))
        own = f"specialized_{name}"
        for expert, linear in zip(self.chosen, ExpertLinears(getattr(self, own), adapters.get(own)), strict=True):
            projections[expert] = linear
        return projections

    @torch.no_grad()
    def fold(self) -> RoutedExperts:
        """Plain routed experts again, with the chosen ones' weights in the fused ones' place."""
        with torch.device("meta"):
            experts = RoutedExperts(self.config)
        for name in ("gate_up_proj", "down_proj"):
            getattr(self, name)[self.chosen] = getattr(self, f"specialized_{name}")
            setattr(experts, name, getattr(self, name))
        return experts.train(self.training)


def specialize(model: PreTrainedModel, config: ExpertConfig) -> PreTrainedModel:
    """Freezes `model`, in place, but for what `config` names.

    Raises `ValueError` where that does not fit the model. The output head and the MTP layers stay frozen.
    """
    config.check(model.config)
    model.requires_grad_(False)
    for layer, chosen in config.experts.items():
        if chosen:
            mixture = model.model.layers[layer].mlp
            mixture.experts = SpecializedExperts(mixture.experts, chosen)
    for parameter in trained_besides_experts(model, config).values():
        parameter.requires_grad_(True)
    model.expert_config = config
    return model


def trained_besides_experts(model: PreTrainedModel, config: ExpertConfig) -> dict[str, nn.Parameter]:
    """The parameters of the backbone, by name, that `config` trains whole: none of the routed experts', and none of the
    MTP layers'."""
    main_layers = tuple(f"layers.{index}." for index in range(model.config.num_hidden_layers))
    wanted = {"experts": False, "shared_experts": config.shared_experts}
    return {
        name: parameter
        for name, parameter in model.model.named_parameters()
        if wanted.get(kind_of(f".{name}"), config.non_expert_modules)
        and (not name.startswith("layers.") or name.startswith(main_layers))
    }


def expert_config_of(model: nn.Module) -> ExpertConfig | None:
    """What `model` (PEFT may have wrapped it) was specialized to; `None` where it was not."""
    return getattr(model.get_base_model() if isinstance(model, PeftModel) else model, "expert_config", None)


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, in place, as an ordinary model with the trained experts among the others."""
    for layer in model.model.layers:
        if isinstance(experts := getattr(layer.mlp, "experts", None), SpecializedExperts):
            layer.mlp.experts = experts.fold()
    model.expert_config = None
    return model


def expert_views(model: PreTrainedModel, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Views of one expert's three matrices, by their names in the checkpoints; of its own weights if it has some."""
    experts = model.model.layers[layer].mlp.experts
    if isinstance(experts, SpecializedExperts) and expert in experts.chosen:
        row = experts.chosen.index(expert)
        gate_up, down = experts.specialized_gate_up_proj[row], experts.specialized_down_proj[row]
    else:
        gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    gate, up = gate_up.chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def trained_tensors(model: PreTrainedModel, config: ExpertConfig) -> dict[str, torch.Tensor]:
    """What training with `config` changes, by the names of the published ESFT files (those of the backbone)."""
    tensors = {}
    for layer, chosen in config.experts.items():
        for expert in chosen:
            for name, view in expert_views(model, layer, expert).items():
                tensors[f"layers.{layer}.mlp.experts.{expert}.{name}.weight"] = view
    return tensors | trained_besides_experts(model, config)


@torch.no_grad()
def save_esft(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes only what was trained, and its `expert_cfg.json`, in the form of the published ESFT adapters."""
    config = expert_config_of(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.write(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(model, config).items()}
    save_file(tensors, Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


@torch.no_grad()
def load_esft(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel | PeftModel:
    """Puts what `save_esft` wrote onto the base `model`: into its weights in place, or as a PEFT adapter where the
    experts were trained by LoRA.

    Raises `ValueError` where the folder's experts or tensors are not those of the model.
    """
    folder = Path(folder)
    if not (folder / EXPERT_CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no {EXPERT_CONFIG_NAME}; accepted: a folder that ESFT has written.")
    config = ExpertConfig.read(folder / EXPERT_CONFIG_NAME)
    config.check(model.config)
    if (folder / PEFT_CONFIG_NAME).is_file():
        return PeftModel.from_pretrained(specialize(model, config), folder)
    saved = {}
    for path in sorted(folder.glob("*.safetensors")):
        saved |= {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    wanted = trained_tensors(model, config)
    odd = sorted(wanted.keys() ^ saved.keys()) or [n for n in wanted if wanted[n].shape != saved[n].shape]
    if odd:
        raise ValueError(
            f"{folder} does not fit the model: {len(odd)} tensors are missing, superfluous or of another shape "
            f"({', '.join(odd[:4])}{', …' * (len(odd) > 4)}); accepted: those of the experts that {EXPERT_CONFIG_NAME} "
            "names."
        )
    for name, tensor in wanted.items():
        tensor.copy_(saved[name])
    return model
