"""Checkpoints in the official layout, read and written through transformers' weight conversion.

On disk every expert has three tensors of its own, `mlp.experts.<i>.{gate,up,down}_proj.weight`; in memory all
experts of a layer are two, `mlp.experts.gate_up_proj` [E, 2I, H] and `mlp.experts.down_proj` [E, H, I]. MTP layers are
`model.layers.<num_hidden_layers + k>` in both.

transformers warns of missing and unexpected tensors and goes on with random weights. Here a checkpoint that does not
fit is an error that names the tensors as the checkpoint does, raised from the headers of its files before any weight
is read.
"""

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from . import fp8

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that find the files; configuration, weights and adapter are found alike.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Arguments of `from_pretrained` that share a name with a field of the configuration and yet are not meant for it.
_NOT_FOR_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config", "distributed_config", "fusion_config")
# With these, transformers reads other files than a checkpoint's plain safetensors.
_OTHER_FILES = ("gguf_file", "variant", "key_mapping")
# An MTP layer's copies of the main model's embedding and output head in the official files; here they are shared.
_MTP_COPY = re.compile(r"(?:^|\.)layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_HEAD = re.compile(r"^(lm_head|score)\.")
_ROWS_AT_A_TIME = 4096  # when two large tensors are compared
_SHOWN = 8  # tensor names in an error message


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit the model; the message names the tensors. (A `RuntimeError`, as transformers
    raises for tensors of another shape.)"""


def register_checkpoint_layout(model_type: str) -> None:
    """Tells transformers that checkpoints of `model_type` keep experts apart on disk. The mapping is the one that
    transformers uses for its own DeepSeek classes, so theirs read and write as before."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class StoredTensor(NamedTuple):
    """What a file's header says of a tensor: its shape, and its dtype as safetensors writes it ("F32", "F8_E4M3")."""

    shape: tuple[int, ...]
    dtype: str = ""


def in_official_layout(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` by name, the fused tensors of all experts replaced by one an expert and projection."""
    official = {}
    for name, (shape, dtype) in tensors.items():
        prefix, _, projection = name.rpartition(".")
        if projection == "gate_up_proj":
            half = StoredTensor((shape[1] // 2, shape[2]), dtype)
            for expert in range(shape[0]):
                official[f"{prefix}.{expert}.gate_proj.weight"] = official[f"{prefix}.{expert}.up_proj.weight"] = half
        elif projection == "down_proj":
            for expert in range(shape[0]):
                official[f"{prefix}.{expert}.down_proj.weight"] = StoredTensor(shape[1:], dtype)
        else:
            official[name] = StoredTensor(shape, dtype)
    return official


class CheckpointFiles:
    """The headers of a checkpoint's safetensors files, in a folder or on the Hub; no file, no tensors.

    Raises `CheckpointError` where a file is missing, truncated or not safetensors.
    """

    def __init__(self, name_or_path: str, hub_arguments: dict):
        def find(file: str) -> str | None:
            return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_arguments)

        self.name = name_or_path
        self._file_of = {}  # tensor name → open file
        self.tensors: dict[str, StoredTensor] = {}
        for path in self._shards(find, hub_arguments):
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                self.tensors[name] = StoredTensor(tuple(header.get_shape()), header.get_dtype())
                self._file_of[name] = file

    def _shards(self, find, hub_arguments: dict) -> list[str]:
        """The paths of the weight files, downloaded where need be."""
        if whole := find(SAFE_WEIGHTS_NAME):  # transformers prefers it too
            return [whole]
        index = find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            return []
        try:
            paths, _ = get_checkpoint_shard_files(self.name, index, **hub_arguments)
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(
                f"{index} is not an index of safetensors files ({error!r}); accepted: the complete file."
            ) from error
        if absent := [Path(path).name for path in paths if not Path(path).is_file()]:
            raise CheckpointError(f"{self.name} lacks {_listed(absent)}, which its index names.")
        return paths

    @staticmethod
    def _open(path: str):
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}); accepted: the complete file, copied or "
                "downloaded again."
            ) from error

    def equal(self, one: str, other: str) -> bool:
        """Whether two stored tensors hold the same numbers; read piece by piece, as embeddings take gigabytes."""
        if self.tensors[one].shape != self.tensors[other].shape:
            return False
        first, second = self._file_of[one].get_slice(one), self._file_of[other].get_slice(other)
        return all(
            torch.equal(first[row : row + _ROWS_AT_A_TIME].float(), second[row : row + _ROWS_AT_A_TIME].float())
            for row in range(0, self.tensors[one].shape[0], _ROWS_AT_A_TIME)
        )


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

        Raises `CheckpointError` where tensors are missing, have another shape, sit in a missing or truncated file, or
        belong to nothing in the model; also where an MTP layer's copy of embedding or head differs from the main
        model's. Not an error:

        - layers that the caller cuts off with `num_hidden_layers` or `num_nextn_predict_layers`: left out with a
          warning that counts their tensors;
        - a backbone or classifier made from a language model: head and MTP layers are left aside, a classifier's new
          head is initialised, as transformers does;
        - other shapes with `ignore_mismatched_sizes=True`;
        - whatever a caller who asks for `output_loading_info=True` finds reported there.
        """
        if pretrained_model_name_or_path is not None:
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            # An adapter's folder names its base model, which transformers loads first.
            adapter_arguments = kwargs.get("adapter_kwargs") or {}
            _, base, _ = maybe_load_adapters(pretrained_model_name_or_path, hub_arguments, **adapter_arguments)
            if not isinstance(config, PreTrainedConfig):
                held_back = {name: kwargs.pop(name) for name in _NOT_FOR_THE_CONFIG if name in kwargs}
                source = base if config is None else config
                config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
                kwargs |= held_back | hub_arguments
            if fp8.is_fp8(config):
                config = fp8.dequantizing(config, kwargs.pop("quantization_config", None))
            reads_safetensors = kwargs.get("use_safetensors") is not False
            if reads_safetensors and not output_loading_info and not any(kwargs.get(name) for name in _OTHER_FILES):
                _check_files(cls, config, model_args, base, hub_arguments, ignore_mismatched_sizes)
                kwargs["force_download"] = False  # the check has downloaded the files
        return super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=output_loading_info,
            **kwargs,
        )


def _check_files(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    model_args: tuple,
    name_or_path: str,
    hub_arguments: dict,
    ignore_mismatched_sizes: bool,
) -> None:
    """Raises a `CheckpointError` if the safetensors files of a checkpoint do not hold what `cls` needs."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method not in (None, fp8.METHOD):
        return  # stored in a form of another quantiser's own
    files = CheckpointFiles(name_or_path, hub_arguments)
    if not files.tensors:
        return

    with torch.device("meta"):
        model = cls(copy.deepcopy(config), *model_args)
    found = in_official_layout(files.tensors)
    wanted = _wanted_tensors(model, found)
    in_fp8 = [name for name in wanted.keys() & found.keys() if found[name].dtype.startswith("F8_")]
    if in_fp8 and method is None:
        raise CheckpointError(
            f"{name_or_path} holds FP8 tensors ({_listed(in_fp8)}) and its configuration no `quantization_config`; "
            'accepted: `{"quant_method": "fp8", "weight_block_size": [rows, columns], ...}`.'
        )
    for name in in_fp8:
        scale = fp8.scale_shape(found[name].shape, fp8.block_size(quantization))
        wanted[f"{name}_scale_inv"] = StoredTensor(scale)

    tied = model.all_tied_weights_keys.keys()
    missing = [name for name in wanted.keys() - found.keys() - tied if model.can_generate() or not _HEAD.match(name)]
    extra = _extra_tensors(model, files, found.keys() - wanted.keys(), hub_arguments)
    mismatched = [
        f"{name} ({list(found[name].shape)}, the model has {list(wanted[name].shape)})"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape and not ignore_mismatched_sizes
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("of another shape", mismatched), ("belonging to nothing", extra))
        if names
    ]
    if not problems:
        return
    message = f"The checkpoint {name_or_path} does not fit {cls.__name__}. Tensors {'; '.join(problems)}."
    depth, first = config.num_nextn_predict_layers, config.num_hidden_layers
    if any(_layer_index(name) >= first for name in missing):
        message += (
            f" The configuration announces MTP layers (`num_nextn_predict_layers` is {depth}), which the checkpoint "
            f"lacks at `model.layers.{first}`; accepted: a checkpoint that holds them, or "
            "`num_nextn_predict_layers=0` to load the model without."
        )
    raise CheckpointError(message)


def _wanted_tensors(model: PreTrainedModel, found: Iterable[str]) -> dict[str, StoredTensor]:
    """What `model` needs, by the names of the checkpoint: a language model's begin with `model.`, a backbone's not."""
    wanted = in_official_layout({name: StoredTensor(tuple(t.shape)) for name, t in model.state_dict().items()})
    prefix = f"{model.base_model_prefix}."
    prefixed = any(name.startswith(prefix) for name in wanted)
    if any(name.startswith(prefix) for name in found) == prefixed:
        return wanted
    return {name.removeprefix(prefix) if prefixed else prefix + name: tensor for name, tensor in wanted.items()}


def _extra_tensors(
    model: PreTrainedModel, files: CheckpointFiles, unwanted: Iterable[str], hub_arguments: dict
) -> list[str]:
    """Which of the `unwanted` tensors the checkpoint should not hold. Layers left out on purpose are counted in a
    warning, MTP layers' copies of embedding and head are compared with the main model's."""
    config, num_layers = model.config, len(model.get_decoder().layers)
    extra, left_out = [], []
    for name in unwanted:
        layer = _layer_index(name)
        if layer >= num_layers:
            left_out.append(name)
        elif layer >= config.num_hidden_layers and _MTP_COPY.search(name):
            _check_mtp_copy(files, name, config.tie_word_embeddings)
        elif not name.endswith("rotary_emb.inv_freq") and (model.can_generate() or not _HEAD.match(name)):
            extra.append(name)
    if not left_out:
        return extra
    stored = _stored_config(files.name, hub_arguments)
    announced = stored.get("num_hidden_layers", 0) + (stored.get("num_nextn_predict_layers") or 0)
    if model.can_generate() and config.num_nextn_predict_layers and announced <= num_layers:
        return extra + left_out
    logger.warning(
        f"{len(left_out)} tensors of layers past the last of this model ({num_layers - 1}) are left out: "
        f"{_listed(left_out)}."
    )
    return extra


def _stored_config(name_or_path: str, hub_arguments: dict) -> dict:
    """The checkpoint's own `config.json`; empty where it has none."""
    try:
        return PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments)[0]
    except OSError:
        return {}


def _check_mtp_copy(files: CheckpointFiles, name: str, tied: bool) -> None:
    """The official files repeat embedding and head in each MTP layer. A copy that differs would be lost here."""
    is_head = "shared_head" in name and not (tied and "lm_head.weight" not in files.tensors)
    original = "lm_head.weight" if is_head else "model.embed_tokens.weight"
    if original in files.tensors and not files.equal(name, original):
        raise CheckpointError(
            f"{name} of {files.name} differs from {original}; accepted: MTP layers that share embedding and output "
            "head with the main model (DeepSeek-V3 §2.2)."
        )


def _layer_index(name: str) -> int:
    layer = _LAYER.search(name)
    return int(layer.group(1)) if layer else -1


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f", … ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
