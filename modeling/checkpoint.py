"""Checkpoints in the official layout, read and written through transformers' weight conversion.

On disk every expert has three tensors of its own, `mlp.experts.<i>.{gate,up,down}_proj.weight`; in memory all
experts of a layer are two, `mlp.experts.gate_up_proj` [E, 2I, H] and `mlp.experts.down_proj` [E, H, I]. MTP layers are
`model.layers.<num_hidden_layers + k>` in both.

transformers warns of missing and unexpected tensors and goes on with random weights. Here a language model whose
checkpoint does not fit is an error that names the tensors.
"""

import copy
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.peft_utils import find_adapter_config_file

from .fp8 import METHOD

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that find the files; the configuration needs them as the weights do.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Embedding and output head of an MTP layer: copies of the main model's in the official files, shared here.
_MTP_COPIES = {"embed_tokens": "get_input_embeddings", "shared_head.head": "get_output_embeddings"}
_MTP_COPY = re.compile(r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHOWN = 8  # tensor names in an error message


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model; the message names the tensors."""


def register_checkpoint_layout(model_type: str) -> None:
    """Tells transformers that checkpoints of `model_type` keep experts apart on disk. The mapping is the one that
    transformers uses for its own DeepSeek classes, so theirs read and write as before."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


def official_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors of `model` in the official layout, one an expert and projection."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        prefix, _, projection = name.rpartition(".")
        if projection == "gate_up_proj":
            for expert in range(shape[0]):
                for half in ("gate_proj", "up_proj"):
                    tensors[f"{prefix}.{expert}.{half}.weight"] = (shape[1] // 2, shape[2])
        elif prefix.endswith(".experts") and projection == "down_proj":
            tensors |= {f"{prefix}.{expert}.down_proj.weight": shape[1:] for expert in range(shape[0])}
        else:
            tensors[name] = shape
    return tensors


class CheckpointFiles:
    """The safetensors files of a checkpoint, in a folder or in the Hub's cache.

    Raises `CheckpointError` where a file is missing, truncated or not safetensors.
    """

    def __init__(self, name_or_path: str, hub_arguments: dict):
        def find(file: str) -> str | None:
            return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_arguments)

        index = find(SAFE_WEIGHTS_INDEX_NAME)
        if index is not None:
            self.file_of = json.loads(Path(index).read_text())["weight_map"]
            self.paths = {file: find(file) for file in sorted(set(self.file_of.values()))}
            if absent := [file for file, path in self.paths.items() if path is None]:
                raise CheckpointError(f"{name_or_path} lacks {_listed(absent)}, which its index names.")
        else:
            path = find(SAFE_WEIGHTS_NAME)
            self.paths = {} if path is None else {SAFE_WEIGHTS_NAME: path}
            self.file_of = {name: SAFE_WEIGHTS_NAME for path in self.paths.values() for name in self._open(path).keys()}  # noqa: SIM118 (not a dict)

    @staticmethod
    def _open(path: str):
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}); accepted: the complete file, copied or "
                "downloaded again."
            ) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor, read from the files' headers."""
        return {
            name: tuple(file.get_slice(name).get_shape())
            for file in map(self._open, self.paths.values())
            for name in file.keys()  # noqa: SIM118 (not a dict)
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self._open(self.paths[self.file_of[name]]).get_tensor(name)


class CheckpointMixin:
    """`from_pretrained` that reads FP8 blocks and refuses a checkpoint that does not fit."""

    _keys_to_ignore_on_load_unexpected = [_MTP_COPY.pattern]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config: PreTrainedConfig | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`, for checkpoints in the official layout, in FP8 too (dequantised).

        Raises `CheckpointError` where tensors are missing, have another shape, sit in a truncated file, or belong to
        nothing in the model. A backbone or classifier leaves a language model's head and MTP layers aside, and a
        classifier's new head is initialised, as transformers does. Layers that the caller cuts off with
        `num_hidden_layers` or `num_nextn_predict_layers` are left out with a warning that counts their tensors.
        """
        cut_by_caller = bool({"num_hidden_layers", "num_nextn_predict_layers"} & kwargs.keys())
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, PreTrainedConfig) and pretrained_model_name_or_path is not None:
            is_adapter = find_adapter_config_file(pretrained_model_name_or_path, **hub_arguments) is not None
            if config is not None or not is_adapter:  # an adapter's base model is found by transformers
                source = config if config is not None else pretrained_model_name_or_path
                config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
                kwargs |= hub_arguments
        if isinstance(config, PreTrainedConfig):
            config = _dequantizing(config)

        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                **kwargs,
            )
        except (RuntimeError, SafetensorError) as error:
            if isinstance(config, PreTrainedConfig) and kwargs.get("state_dict") is None:
                with torch.device("meta"):
                    model = cls(config, *model_args)
                _compare_with_files(model, pretrained_model_name_or_path, hub_arguments, cut_by_caller)
            raise error

        misfits = _unaccounted(model, info, cut_by_caller)
        if ignore_mismatched_sizes:
            misfits["of another shape"] = []
        if any(misfits.values()):
            if kwargs.get("state_dict") is None:
                _compare_with_files(model, pretrained_model_name_or_path, hub_arguments, cut_by_caller)
            _refuse(model, pretrained_model_name_or_path, misfits)
        if (
            getattr(model.config, "num_nextn_predict_layers", 0)
            and model.can_generate()
            and not kwargs.get("state_dict")
        ):
            _check_mtp_copies(model, pretrained_model_name_or_path, hub_arguments)
        return (model, info) if output_loading_info else model


def _dequantizing(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with an FP8 `quantization_config` that names our reader; others are left as they are."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8":
        config = copy.deepcopy(config)
        config.quantization_config = quantization | {"quant_method": METHOD}
    return config


def _unaccounted(model: PreTrainedModel, info: dict, cut_by_caller: bool) -> dict[str, list[str]]:
    """What transformers' loading report holds against the checkpoint, less what is meant to be so."""
    unexpected = [name for name in info["unexpected_keys"] if not _left_aside(model, name)]
    left_out = [name for name in unexpected if _is_beyond_the_layers(model, name)]
    if cut_by_caller or model.config.num_nextn_predict_layers == 0:
        if left_out:
            logger.warning(
                f"{len(left_out)} tensors of layers past the last of this model are left out: {_listed(left_out)}."
            )
        unexpected = [name for name in unexpected if name not in left_out]
    return {
        "missing": [name for name in info["missing_keys"] if not name.startswith("score.")],
        "of another shape": [
            f"{name} ({list(found)}, the model has {list(wanted)})" for name, found, wanted in info["mismatched_keys"]
        ],
        "belonging to nothing": unexpected,
    }


def _left_aside(model: PreTrainedModel, name: str) -> bool:
    """Whether a backbone or classifier passes over a language model's tensor: its head and its MTP layers."""
    if model.can_generate():
        return False
    return name.startswith("lm_head.") or _is_beyond_the_layers(model, name)


def _is_beyond_the_layers(model: PreTrainedModel, name: str) -> bool:
    layer = _LAYER.search(name)
    return layer is not None and int(layer.group(1)) >= len(model.get_decoder().layers)


def _compare_with_files(model: PreTrainedModel, name_or_path: str, hub_arguments: dict, cut_by_caller: bool) -> None:
    """Raises a `CheckpointError` in the names that the checkpoint uses, if its files differ from the model's layout."""
    found = CheckpointFiles(name_or_path, hub_arguments).shapes()
    wanted = official_tensors(model)
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in found) and not any(name.startswith(prefix) for name in wanted):
        wanted = {prefix + name: shape for name, shape in wanted.items()}  # a backbone reads a language model
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    extra = {
        name for name in found.keys() - wanted.keys() if not name.endswith("_scale_inv") and not _MTP_COPY.search(name)
    }
    info = {
        "missing_keys": sorted(wanted.keys() - found.keys() - tied),
        "unexpected_keys": sorted(extra),
        "mismatched_keys": [
            (name, found[name], wanted[name])
            for name in sorted(found.keys() & wanted.keys())
            if found[name] != wanted[name]
        ],
    }
    misfits = _unaccounted(model, info, cut_by_caller)
    if any(misfits.values()):
        _refuse(model, name_or_path, misfits)


def _refuse(model: PreTrainedModel, name_or_path: str, misfits: dict[str, list[str]]) -> None:
    problems = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in misfits.items() if names)
    message = f"The checkpoint {name_or_path} does not fit {type(model).__name__}. Tensors {problems}."
    depth = model.config.num_nextn_predict_layers
    if depth and any(_layer_index(name) >= model.config.num_hidden_layers for name in misfits["missing"]):
        message += (
            f" The config announces MTP layers (`num_nextn_predict_layers` is {depth}) that the checkpoint lacks; "
            "accepted: a checkpoint that holds them, or `num_nextn_predict_layers=0` to load the model without."
        )
    raise CheckpointError(message)


def _check_mtp_copies(model: PreTrainedModel, name_or_path: str, hub_arguments: dict) -> None:
    """The official files repeat embedding and head in each MTP layer. A copy that differs would be lost here."""
    files = CheckpointFiles(name_or_path, hub_arguments)
    for name in files.file_of:
        if copy_of := _MTP_COPY.search(name):
            shared = getattr(model, _MTP_COPIES[copy_of.group(1)])().weight
            stored = files.read(name)
            if shared.device.type != "meta" and not torch.equal(stored.to(shared.device, shared.dtype), shared):
                raise CheckpointError(
                    f"{name} of {name_or_path} differs from the main model's; accepted: MTP layers that share "
                    "embedding and output head with the main model (DeepSeek-V3 §2.2)."
                )


def _layer_index(name: str) -> int:
    layer = _LAYER.search(name)
    return int(layer.group(1)) if layer else -1


def _listed(names: list[str]) -> str:
    names = sorted(names)
    rest = f", … ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
