"""What a fine-tuning run can be told: a YAML recipe, and the command line on top of it.

Every field of the four dataclasses is a key of the recipe and an option of the command line, which wins.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from deepseek_hf.finetune.adapter import PRESETS


@dataclass
class ModelArguments:
    """Which model is tuned."""

    model_name_or_path: str = HfArg(
        help="Folder or Hub id of the DeepSeek checkpoint to tune, with its tokenizer beside it."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        help="Type of the loaded weights; auto: the checkpoint's own.", default="auto"
    )


@dataclass
class DataArguments:
    """Which conversations it is tuned on, and how they become batches."""

    train_file: str = HfArg(
        help='JSON Lines, one {"messages": [{"role": ..., "content": ...}, ...]} a line; the roles are system, '
        "user and assistant."
    )
    eval_file: str | None = HfArg(
        help="Held-out conversations in the same form. Without them nothing is measured or sampled.", default=None
    )
    max_length: int = HfArg(help="Tokens that a conversation may have.", default=1024)
    long_rows: Literal["error", "drop", "truncate"] = HfArg(
        help="What to do with conversations longer than max_length; they are counted.", default="error"
    )
    packing: bool = HfArg(
        help="Lay the conversations of a batch end to end in one row instead of padding each to the longest.",
        default=False,
    )
    sample_tokens: int = HfArg(
        help="Length of the greedy answer to the first held-out prompt that is printed before and after; 0: none.",
        default=128,
    )


@dataclass
class LoraArguments:
    """What is trained: low-rank adapters (PEFT's LoRA) or, with `lora: false`, the weights; of the whole model or of
    the experts that the task uses (ESFT, arXiv 2407.01906)."""

    lora: bool = HfArg(help="Train an adapter; false: the weights themselves.", default=True)
    lora_r: int = HfArg(help="Rank of the adapter's matrices.", default=16)
    lora_alpha: int = HfArg(help="The adapter's output is scaled by lora_alpha / lora_r.", default=32)
    lora_targets: list[str] = field(
        default_factory=lambda: ["attention"],
        metadata={
            "help": "What gets an adapter. experts: the routed ones; all: attention, dense MLPs, shared and routed "
            "experts; all+mtp: the multi-token-prediction layers too.",
            "choices": list(PRESETS),
        },
    )
    lora_config: str = HfArg(
        help="Further arguments of PEFT's LoraConfig, a mapping (in a recipe) or JSON; they win over the presets.",
        default="{}",
    )
    per_expert_adapter: bool = HfArg(
        help="Also write the adapter with one LoRA an expert, as vLLM and SGLang read it, to output_dir/per_expert.",
        default=False,
    )
    expert_config: str | None = HfArg(
        help='ESFT with the experts that this file names: {"experts": {"<layer>": [<expert>, ...], ...}, '
        '"shared_experts": false, "non_expert_modules": false}.',
        default=None,
    )
    esft_top_p: float | None = HfArg(
        help="ESFT with the fewest experts of each layer whose scores on train_file add up to this (the paper: 0.1 to "
        "0.2).",
        default=None,
    )
    esft_score: Literal["token", "gate"] = HfArg(
        help="ESFT's score of an expert: its share of the tokens, or of the gates' weights.", default="token"
    )
    esft_tokens: int = HfArg(help="Tokens of train_file that the scores are taken from.", default=131072)

    @property
    def peft_arguments(self) -> dict[str, Any]:
        """`lora_config` as a dict."""
        return json.loads(self.lora_config)

    @property
    def esft(self) -> bool:
        """Whether only chosen experts are trained."""
        return self.expert_config is not None or self.esft_top_p is not None


@dataclass
class FinetuningArguments(TrainingArguments):
    """transformers' TrainingArguments, and what they lack."""

    overwrite_output_dir: bool = HfArg(
        help="Write into output_dir although it holds files; earlier checkpoints in it are deleted.", default=False
    )
    router_bias_speed: float = HfArg(
        help="By how much the routers' selection biases move after each step (DeepSeek-V3: 0.001). Needs lora: "
        "false, for an adapter does not hold the biases.",
        default=0.0,
    )
    mtp_loss_weight: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight of the MTP layers' loss; several weights hold for an equal share of the steps each. "
            "Default: the checkpoint's own."
        },
    )
    train_mtp_only: bool = HfArg(
        help="Train the MTP layers, whole, on a frozen model, for drafting. Needs lora: false.", default=False
    )
    init_mtp_from_last_layer: int = HfArg(
        help="Give a checkpoint without MTP layers so many, made from its last layer.", default=0
    )


ARGUMENTS = (ModelArguments, DataArguments, LoraArguments, FinetuningArguments)


def parse_recipe(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, LoraArguments, FinetuningArguments]:
    """Parses `[recipe.yaml] [--field value ...]`.

    The recipe is turned into command-line options and put in front of the given ones, so that both get
    argparse's types and checks and the last one wins. `null` leaves a field at its default.

    Raises:
        SystemExit: with one message on stderr for an unknown field, a value of the wrong type, a field that
            is missing, or a recipe that cannot be read.
    """
    usage = "%(prog)s [recipe.yaml] [--field value ...]"
    parser = HfArgumentParser(ARGUMENTS, prog="train.py", usage=usage, allow_abbrev=False)
    recipe, options = None, list(argv)
    if options and not options[0].startswith("-"):
        recipe = options.pop(0)
    values = {} if recipe is None else _read_yaml(recipe, parser)

    for source, names in ((recipe, values), ("command line", _option_names(options))):
        for name in names:
            _check_name(str(name), source, parser)
    recipe_options = [text for name, value in values.items() for text in _as_options(name, value)]
    *parsed, stray = parser.parse_args_into_dataclasses(
        recipe_options + options, return_remaining_strings=True, look_for_args_file=False
    )
    if stray:
        parser.error(f"command line: {' '.join(stray)} belongs to no field; options are written --field value")
    try:
        is_mapping = isinstance(parsed[2].peft_arguments, dict)
    except json.JSONDecodeError:
        is_mapping = False
    if not is_mapping:
        parser.error(f"lora_config: {parsed[2].lora_config} is not a mapping of arguments of PEFT's LoraConfig")
    return tuple(parsed)


def _read_yaml(path: str, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read the recipe {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path}: a recipe is a mapping of field: value, not {type(values).__name__}")
    return values


def _option_names(options: list[str]) -> list[str]:
    """The fields that `options` name: `--learning-rate=1e-4` → `learning_rate`, `--no_lora` → `lora`."""
    names = [option[2:].split("=")[0].replace("-", "_") for option in options if option.startswith("--")]
    return [name.removeprefix("no_") for name in names if name != "help"]


def _check_name(name: str, source: str, parser: HfArgumentParser) -> None:
    accepted = [spec.name for arguments in ARGUMENTS for spec in dataclasses.fields(arguments) if spec.init]
    if name in accepted:
        return
    close = difflib.get_close_matches(name, accepted)
    inherited = {spec.name for spec in dataclasses.fields(TrainingArguments)}
    parser.error(
        f"{source}: unknown field '{name}'{'; did you mean ' + ' or '.join(close) + '?' if close else '.'} "
        f"Accepted: {', '.join(name for name in accepted if name not in inherited)}, "
        "and every field of transformers' TrainingArguments (--help lists them)."
    )


def _as_options(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
