"""Checkpoints in the official layout: read, written, refused where they do not fit. All of it on real files.

The weights are those of `tests/fixtures/golden`; each test copies a checkpoint, changes the copy, and loads it.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hub_server import LocalHub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FineGrainedFP8Config,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from deepseek_hf.modeling import DeepseekForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from deepseek_hf.modeling.checkpoint import CheckpointError
from deepseek_hf.modeling.fp8 import dequantize_blocks

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
CLASSES = {
    "deepseek_moe": DeepseekForCausalLM,
    "deepseek_v2": DeepseekV2ForCausalLM,
    "deepseek_v2_lite": DeepseekV2ForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
}
# The same computation in the same order gives the same bits; another batching of it stays within this (float32).
TOLERANCE = {"atol": 5e-5, "rtol": 0}
MTP_COPIES = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}  # of golden V3
INPUT_IDS = torch.arange(24).view(2, 12)


class Checkpoint:
    """A copy of a golden checkpoint: its `config` fields and its `tensors`, to be changed and written."""

    def __init__(self, name: str, folder: Path):
        self.folder = folder
        self.config = json.loads((GOLDEN / name / "config.json").read_text())
        self.tensors = load_file(GOLDEN / name / "model.safetensors")

    def write(self, shards: int = 1) -> Path:
        """The folder, with the tensors dealt out to `shards` files in turn."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
            return self.folder
        names = sorted(self.tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[shard::shards]}
            save_file(part, self.folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return self.folder


@pytest.fixture
def checkpoint(tmp_path):
    return lambda name: Checkpoint(name, tmp_path / name)


@pytest.fixture(params=["auto", "class"])
def load(request):
    """`from_pretrained` of AutoModelForCausalLM, or of the class itself."""

    def of_class(folder, **kwargs):
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        name = {"deepseek": "deepseek_moe"}.get(model_type, model_type)
        return CLASSES[name].from_pretrained(folder, **kwargs)

    return AutoModelForCausalLM.from_pretrained if request.param == "auto" else of_class


def logits_of(model):
    with torch.no_grad():
        return model(INPUT_IDS.to(model.device)).logits


def assert_same_tensors(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def tensors_in(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def refusal(load, folder, **kwargs) -> str:
    """The message of the error that loading must end in."""
    with pytest.raises(CheckpointError) as error:
        load(folder, **kwargs)
    return str(error.value)


def warnings_of(load, folder, **kwargs):
    """The model, and what this project's loader warns of."""
    with CaptureLogger(logging.get_logger("deepseek_hf.modeling.checkpoint")) as captured:
        model = load(folder, **kwargs)
    return model, captured.out


# Written and read


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_saved_in_the_official_layout_and_read_back(name, max_shard_size, checkpoint, tmp_path):
    official = checkpoint(name).tensors
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if max_shard_size == "5GB" else 3
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "200KB")
    assert_same_tensors(
        tensors_in(tmp_path), {name: tensor for name, tensor in official.items() if name not in MTP_COPIES}
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is CLASSES[name]
    assert_same_tensors(reloaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_the_order_of_files_and_tensors_does_not_matter(name, checkpoint, load):
    folder = checkpoint(name).write(shards=5)
    assert_same_tensors(load(folder).state_dict(), load(GOLDEN / name).state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16(name, load, tmp_path):
    model = load(GOLDEN / name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = tensors_in(tmp_path)
    biases = {name for name in stored if name.endswith("e_score_correction_bias")}  # bfloat16 cannot hold their steps
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16} == biases
    original = load_file(GOLDEN / name / "model.safetensors")
    for key in stored:
        assert torch.equal(stored[key], original[key].to(stored[key].dtype)), key
    reloaded = load(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert_same_tensors(reloaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["deepseek_moe", "deepseek_v3"])
def test_tied_embeddings(name, checkpoint, load, tmp_path):
    tied = checkpoint(name)
    tied.config["tie_word_embeddings"] = True
    for head in ("lm_head.weight", *MTP_COPIES):
        tied.tensors.pop(head, None)
    if name == "deepseek_v3":  # both copies are then copies of the one matrix
        tied.tensors |= {copy: tied.tensors["model.embed_tokens.weight"].clone() for copy in MTP_COPIES}
    model = load(tied.write())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in tensors_in(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), logits_of(model))


def test_fused_experts_are_read_too(load, tmp_path):
    model = load(GOLDEN / "deepseek_v3")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in tensors_in(tmp_path)
    assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())


def test_a_state_dict_takes_the_place_of_files():
    name = "deepseek_v2"
    config = AutoConfig.from_pretrained(GOLDEN / name)
    official = load_file(GOLDEN / name / "model.safetensors")
    model = DeepseekV2ForCausalLM.from_pretrained(None, config=config, state_dict=official)
    assert_same_tensors(model.state_dict(), AutoModelForCausalLM.from_pretrained(GOLDEN / name).state_dict())


def test_a_subfolder(checkpoint, tmp_path):
    checkpoint("deepseek_v3").write(shards=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="deepseek_v3")
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(GOLDEN / "deepseek_v3")))
    (tmp_path / "deepseek_v3" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path, subfolder="deepseek_v3")


def test_loading_leaves_the_random_state_alone(load):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    load(GOLDEN / "deepseek_v3")
    assert torch.equal(torch.random.get_rng_state(), before)


# FP8

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Block by block, as README_WEIGHTS.md of DeepSeek-V3 has it."""
    result = torch.empty(weight.shape)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = slice(128 * row, 128 * (row + 1)), slice(128 * column, 128 * (column + 1))
            result[block] = weight[block].float() * scale[row, column].float()
    return result


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of up to 128×128 in FP8, one scale."""
    scale = weight.abs().max() / torch.finfo(FP8).max
    return (weight / scale).to(FP8), scale.view(1, 1)


@pytest.fixture
def fp8_checkpoint(checkpoint):
    """The golden FP8 checkpoint as the official ones are: everything else in bfloat16."""
    fp8 = checkpoint("deepseek_v3_fp8")
    fp8.config["torch_dtype"] = "bfloat16"
    fp8.tensors = {
        name: tensor if tensor.dtype == FP8 or name.endswith((SCALE, "_bias")) else tensor.bfloat16()
        for name, tensor in fp8.tensors.items()
    }
    return fp8


def assert_dequantized(model, checkpoint: Checkpoint, dtype: torch.dtype, tmp_path: Path):
    assert {tensor.dtype for name, tensor in model.state_dict().items() if not name.endswith("_bias")} == {dtype}
    assert model.dtype == dtype
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    expected = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype == FP8:
            expected[name] = dequantized(tensor, checkpoint.tensors[name + SCALE]).to(dtype)
        elif not name.endswith(SCALE):
            expected[name] = tensor if name.endswith("_bias") else tensor.to(dtype)
    assert_same_tensors(tensors_in(tmp_path / "saved"), expected)
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"quantization_config": FineGrainedFP8Config(dequantize=True)}, torch.bfloat16),
    ],
    ids=["default", "auto", "torch_dtype=auto", "bfloat16", "float32", "float16", "quantization_config"],
)
@pytest.mark.parametrize("shards", [1, 4])
def test_fp8_is_dequantized(kwargs, dtype, shards, fp8_checkpoint, load, tmp_path):
    assert_dequantized(load(fp8_checkpoint.write(shards), **kwargs), fp8_checkpoint, dtype, tmp_path)


def test_fp8_is_dequantized_or_refused(fp8_checkpoint, load):
    with pytest.raises(ValueError, match=r"the checkpoint is in FP8; accepted: nothing, or .*dequantize=True"):
        load(fp8_checkpoint.write(), quantization_config=FineGrainedFP8Config(dequantize=False))


def test_fp8_without_blocks(fp8_checkpoint, load):
    fp8_checkpoint.config["quantization_config"]["weight_block_size"] = None
    with pytest.raises(ValueError, match=r"weight_block_size'\]` is None; accepted: \[rows, columns\]"):
        load(fp8_checkpoint.write())


def test_fp8_with_scales_that_are_no_numbers():
    weight, scale = torch.ones(4, 4).to(FP8), torch.ones(1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`weight_scale_inv` is stored in torch\.uint8; accepted: float32"):
        dequantize_blocks(weight, scale, (128, 128), torch.float32)


@pytest.mark.parametrize("given", ["object", "path"])
def test_fp8_with_a_configuration_given(given, fp8_checkpoint, load, tmp_path):
    folder = fp8_checkpoint.write()
    config = AutoConfig.from_pretrained(folder) if given == "object" else str(folder)
    if given == "path" and load is AutoModelForCausalLM.from_pretrained:
        config = AutoConfig.from_pretrained(config)  # the Auto classes take no path
    assert_dequantized(load(folder, config=config), fp8_checkpoint, torch.bfloat16, tmp_path)
    if given == "object":
        assert config.quantization_config["quant_method"] == "fp8"  # the caller's object is not touched


@pytest.mark.parametrize("stored_as", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_fp8_with_power_of_two_scales(stored_as, fp8_checkpoint, load, tmp_path):
    """DeepSeek-V3.1's `scale_fmt`."""
    fp8_checkpoint.config["quantization_config"]["scale_fmt"] = "ue8m0"
    for name, tensor in fp8_checkpoint.tensors.items():
        if name.endswith(SCALE):
            fp8_checkpoint.tensors[name] = tensor.log2().ceil().exp2().to(stored_as)
    assert_dequantized(load(fp8_checkpoint.write()), fp8_checkpoint, torch.bfloat16, tmp_path)


def test_fp8_dtype_where_the_configuration_names_none(fp8_checkpoint, load, tmp_path):
    del fp8_checkpoint.config["torch_dtype"]
    assert_dequantized(load(fp8_checkpoint.write()), fp8_checkpoint, torch.bfloat16, tmp_path)


def test_fp8_mtp_layers(checkpoint, load):
    fp8 = checkpoint("deepseek_v3")
    fp8.config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    for name in [name for name in fp8.tensors if re.search(r"experts.*proj|self_attn.*proj|eh_proj", name)]:
        fp8.tensors[name], fp8.tensors[name + SCALE] = quantized(fp8.tensors[name])
    model = load(fp8.write())
    name = "model.layers.3.eh_proj.weight"
    expected = dequantized(fp8.tensors[name], fp8.tensors[name + SCALE])
    assert torch.equal(model.mtp_layers[0].eh_proj.weight, expected)
    expert = "model.layers.3.mlp.experts.5.down_proj.weight"
    expected = dequantized(fp8.tensors[expert], fp8.tensors[expert + SCALE])
    assert torch.equal(model.mtp_layers[0].mlp.experts.down_proj[5], expected)


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.experts.2.up_proj", "mlp.shared_experts.down_proj"])
def test_fp8_without_a_scale(name, fp8_checkpoint, load):
    scale = f"model.layers.1.{name}.weight{SCALE}"
    del fp8_checkpoint.tensors[scale]
    assert f"Tensors 1 missing: {scale}." in refusal(load, fp8_checkpoint.write())


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.experts.2.up_proj"])
def test_fp8_with_a_scale_of_another_shape(name, fp8_checkpoint, load):
    scale = f"model.layers.1.{name}.weight{SCALE}"
    found = fp8_checkpoint.tensors[scale]
    fp8_checkpoint.tensors[scale] = torch.cat([found, found])
    shapes = f"({[2 * found.shape[0], found.shape[1]]}, the model has {list(found.shape)})"
    assert f"Tensors 1 of another shape: {scale} {shapes}." in refusal(load, fp8_checkpoint.write())


def test_fp8_scale_of_no_fp8_weight(fp8_checkpoint, load):
    name = "model.layers.1.self_attn.o_proj.weight"
    fp8_checkpoint.tensors[name] = fp8_checkpoint.tensors[name].bfloat16()
    assert f"Tensors 1 belonging to nothing: {name}{SCALE}." in refusal(load, fp8_checkpoint.write())


def test_fp8_that_the_configuration_does_not_mention(fp8_checkpoint, load):
    del fp8_checkpoint.config["quantization_config"]
    message = refusal(load, fp8_checkpoint.write())
    assert "model.layers.0.mlp.down_proj.weight" in message
    assert "`quantization_config`; accepted:" in message


# Checkpoints that do not fit

EXPERT = "model.layers.2.mlp.experts.5"
NORM = "model.layers.1.post_attention_layernorm.weight"


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def reshaped(name, shape):
    def change(tensors):
        tensors[name] = tensors[name].flatten()[: math.prod(shape)].reshape(shape).clone()

    return change


def renamed(name, new_name):
    return lambda tensors: tensors.__setitem__(new_name, tensors.pop(name))


# What was changed in golden V3, and what the error must say of it.
MISFITS = {
    "an expert's down_proj missing": (without(f"{EXPERT}.down_proj.weight"), f"1 missing: {EXPERT}.down_proj.weight"),
    "an expert's gate_proj missing": (without(f"{EXPERT}.gate_proj.weight"), f"1 missing: {EXPERT}.gate_proj.weight"),
    "the last expert missing": (
        without(*(f"model.layers.1.mlp.experts.15.{part}_proj.weight" for part in ("gate", "up", "down"))),
        "3 missing: model.layers.1.mlp.experts.15.down_proj.weight, model.layers.1.mlp.experts.15.gate_proj.weight, "
        "model.layers.1.mlp.experts.15.up_proj.weight",
    ),
    "a norm missing": (without(NORM), f"1 missing: {NORM}"),
    "the head missing": (without("lm_head.weight"), "1 missing: lm_head.weight"),
    "the router's bias missing": (
        without("model.layers.1.mlp.gate.e_score_correction_bias"),
        "1 missing: model.layers.1.mlp.gate.e_score_correction_bias",
    ),
    "an expert's gate_proj of another shape": (
        reshaped(f"{EXPERT}.gate_proj.weight", (31, 64)),
        f"1 of another shape: {EXPERT}.gate_proj.weight ([31, 64], the model has [32, 64])",
    ),
    "an expert's down_proj transposed": (
        reshaped(f"{EXPERT}.down_proj.weight", (32, 64)),
        f"1 of another shape: {EXPERT}.down_proj.weight ([32, 64], the model has [64, 32])",
    ),
    "a norm of another shape": (reshaped(NORM, (32,)), f"1 of another shape: {NORM} ([32], the model has [64])"),
    "an expert's number mistaken": (  # as many as before, so that stacking them would go unnoticed
        renamed(f"{EXPERT}.down_proj.weight", "model.layers.2.mlp.experts.16.down_proj.weight"),
        f"1 missing: {EXPERT}.down_proj.weight; 1 belonging to nothing: model.layers.2.mlp.experts.16.down_proj.weight",
    ),
    "a tensor that belongs to nothing": (
        lambda tensors: tensors.update({"model.layers.1.self_attn.sinks": torch.ones(4)}),
        "1 belonging to nothing: model.layers.1.self_attn.sinks",
    ),
    "a layer too many": (
        lambda tensors: tensors.update({"model.layers.4.enorm.weight": torch.ones(64)}),
        "1 belonging to nothing: model.layers.4.enorm.weight",
    ),
    "an embedding in a layer without MTP": (
        lambda tensors: tensors.update({"model.layers.1.embed_tokens.weight": torch.ones(320, 64)}),
        "1 belonging to nothing: model.layers.1.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_is_an_error_that_names_the_tensor(misfit, shards, checkpoint, load):
    changed = checkpoint("deepseek_v3")
    change, said = MISFITS[misfit]
    change(changed.tensors)
    folder = changed.write(shards)
    expected = f"The checkpoint {folder} does not fit DeepseekV3ForCausalLM. Tensors {said}."
    assert refusal(load, folder) == expected


@pytest.mark.parametrize("name", ["deepseek_moe", "deepseek_v2_lite"])
def test_a_misfit_in_the_other_families(name, checkpoint, load):
    changed = checkpoint(name)
    del changed.tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    assert "Tensors 1 missing: model.layers.2.mlp.experts.7.up_proj.weight." in refusal(load, changed.write())


def test_many_tensors_are_counted_and_some_named(checkpoint, load):
    changed = checkpoint("deepseek_v2")
    for name in [name for name in changed.tensors if ".experts.0." in name or ".experts.1." in name]:
        del changed.tensors[name]
    message = refusal(load, changed.write())
    assert "Tensors 12 missing: model.layers.1.mlp.experts.0.down_proj.weight, " in message
    assert "(4 more)" in message


def cut(file: Path, size: int):
    os.truncate(file, size)


@pytest.mark.parametrize("size", [0, 4, 1000, -64], ids=["empty", "in its length", "in its header", "in its data"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_cut_file_is_an_error_that_names_it(size, shards, checkpoint, load):
    folder = checkpoint("deepseek_v3").write(shards)
    file = sorted(folder.glob("*.safetensors"))[-1]
    cut(file, size if size >= 0 else file.stat().st_size + size)
    message = refusal(load, folder)
    assert message.startswith(f"{file} is truncated or not a safetensors file")
    assert "accepted: the complete file" in message


def test_a_missing_shard_is_an_error_that_names_it(checkpoint, load):
    folder = checkpoint("deepseek_v3").write(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refusal(load, folder) == f"{folder} lacks model-00002-of-00003.safetensors, which its index names."


def test_a_cut_index_is_an_error_that_names_it(checkpoint, load):
    folder = checkpoint("deepseek_v3").write(shards=3)
    index = folder / "model.safetensors.index.json"
    cut(index, index.stat().st_size // 2)
    assert refusal(load, folder).startswith(f"{index} is not an index of safetensors files")


def test_no_weights_at_all(checkpoint, load):
    folder = checkpoint("deepseek_v3").write()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(folder)


def test_other_shapes_on_request(load):
    folder = GOLDEN / "deepseek_v2"
    message = refusal(load, folder, vocab_size=100)
    assert "model.embed_tokens.weight ([320, 64], the model has [100, 64])" in message
    model = load(folder, vocab_size=100, ignore_mismatched_sizes=True)
    assert model.model.embed_tokens.weight.shape == model.lm_head.weight.shape == (100, 64)
    kept = AutoModelForCausalLM.from_pretrained(folder).model.layers.state_dict()
    assert_same_tensors(model.model.layers.state_dict(), kept)


def test_who_asks_for_the_loading_report_gets_it(checkpoint, load):
    changed = checkpoint("deepseek_v3")
    del changed.tensors[NORM]
    changed.tensors["model.extra"] = torch.ones(1)
    model, report = load(changed.write(), output_loading_info=True)
    assert report["missing_keys"] == {NORM}
    assert report["unexpected_keys"] == {"model.extra"}
    assert torch.equal(model.model.layers[1].post_attention_layernorm.weight, torch.ones(64))


# Multi-Token Prediction


def without_mtp(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.tensors = {
        name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("model.layers.3.")
    }
    return checkpoint


def test_announced_mtp_layers_that_are_missing(checkpoint, load):
    folder = without_mtp(checkpoint("deepseek_v3")).write()
    message = refusal(load, folder)
    assert "model.layers.3." in message
    assert "(`num_nextn_predict_layers` is 1)" in message
    assert "`num_nextn_predict_layers=0` to load the model without" in message
    model = load(folder, num_nextn_predict_layers=0)
    assert len(model.mtp_layers) == 0
    assert torch.equal(logits_of(model), logits_of(load(GOLDEN / "deepseek_v3")))


def test_mtp_layers_left_out_are_counted(load):
    folder = GOLDEN / "deepseek_v3"
    count = sum(name.startswith("model.layers.3.") for name in load_file(folder / "model.safetensors"))
    model, warned = warnings_of(load, folder, num_nextn_predict_layers=0)
    assert f"{count} tensors of layers past the last of this model (2) are left out: model.layers.3." in warned
    full, silent = warnings_of(load, folder)
    assert silent == ""
    assert torch.equal(logits_of(model), logits_of(full))


@pytest.mark.parametrize("copy", sorted(MTP_COPIES))
@pytest.mark.parametrize("shards", [1, 3])
def test_a_copy_of_embedding_or_head_that_differs_is_refused(copy, shards, checkpoint, load):
    changed = checkpoint("deepseek_v3")
    changed.tensors[copy][-1, -1] += 1
    folder = changed.write(shards)
    original = "lm_head.weight" if "head" in copy else "model.embed_tokens.weight"
    assert refusal(load, folder).startswith(f"{copy} of {folder} differs from {original}; accepted: MTP layers that")
    changed.tensors[copy] = changed.tensors[copy][1:].clone()
    assert copy in refusal(load, changed.write(shards))
    model, warned = warnings_of(load, folder, num_nextn_predict_layers=0)  # left out with the layer
    assert len(model.mtp_layers) == 0
    assert copy in warned or "more)" in warned


def test_copies_of_embedding_and_head_may_be_absent(checkpoint, load):
    changed = checkpoint("deepseek_v3")
    for copy in MTP_COPIES:
        del changed.tensors[copy]
    assert_same_tensors(load(changed.write()).state_dict(), load(GOLDEN / "deepseek_v3").state_dict())


# Fewer layers


@pytest.mark.parametrize("name", ["deepseek_moe", "deepseek_v2_lite", "deepseek_v3"])
def test_layers_cut_off_are_counted(name, load):
    folder = GOLDEN / name
    kwargs = {"num_hidden_layers": 2} | ({"num_nextn_predict_layers": 0} if name == "deepseek_v3" else {})
    model, warned = warnings_of(load, folder, **kwargs)
    count = sum(bool(re.match(r"model\.layers\.[23]\.", name)) for name in load_file(folder / "model.safetensors"))
    assert f"{count} tensors of layers past the last of this model (1) are left out: model.layers.2." in warned
    full = load(folder)
    full.model.layers = full.model.layers[:2]
    full.config.num_hidden_layers = full.model.config.num_hidden_layers = 2
    assert torch.equal(logits_of(model), logits_of(full))


def test_layers_cut_off_by_a_configuration(load):
    folder = GOLDEN / "deepseek_v2"
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    model, warned = warnings_of(load, folder, config=config)
    assert len(model.model.layers) == 1
    assert "tensors of layers past the last of this model (0) are left out" in warned


def test_layers_cut_off_before_mtp_layers_need_a_word_on_those(load):
    message = refusal(load, GOLDEN / "deepseek_v3", num_hidden_layers=2)
    assert "model.layers.2.enorm.weight" in message
    assert "`num_nextn_predict_layers=0` to load the model without" in message


def test_more_layers_than_there_are(load):
    assert "missing: model.layers.3.input_layernorm.weight" in refusal(
        load, GOLDEN / "deepseek_v2", num_hidden_layers=4
    )


# Backbones and classifiers


@pytest.mark.parametrize("name", CLASSES)
def test_a_backbone_is_read_from_a_language_model(name, tmp_path):
    backbone, warned = warnings_of(AutoModel.from_pretrained, GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        hidden_states = backbone(expected["input_ids"]).last_hidden_state
    torch.testing.assert_close(hidden_states, expected["last_hidden_state"], **TOLERANCE)
    assert ("tensors of layers past the last of this model (2) are left out" in warned) == (name == "deepseek_v3")
    backbone.save_pretrained(tmp_path)
    assert "norm.weight" in tensors_in(tmp_path)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path).state_dict(), backbone.state_dict())


def test_a_language_model_is_not_read_from_a_backbone(tmp_path, load):
    AutoModel.from_pretrained(GOLDEN / "deepseek_v2").save_pretrained(tmp_path)
    assert "Tensors 1 missing: lm_head.weight." in refusal(load, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_a_classifier_is_read_from_a_language_model(name, tmp_path):
    folder = GOLDEN / name
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    backbone = AutoModel.from_pretrained(folder)
    assert_same_tensors(classifier.model.state_dict(), backbone.state_dict())
    assert classifier.score.weight.shape == (3, 64)
    assert logits_of(classifier).shape == (2, 3)
    classifier.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_tensors(reloaded.state_dict(), classifier.state_dict())
    assert_same_tensors(AutoModel.from_pretrained(tmp_path).state_dict(), backbone.state_dict())


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_backbones_and_classifiers_are_checked_too(auto, checkpoint):
    changed = checkpoint("deepseek_v3")
    del changed.tensors[f"{EXPERT}.down_proj.weight"]
    assert f"Tensors 1 missing: {EXPERT}.down_proj.weight." in refusal(auto.from_pretrained, changed.write())


# Adapters


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A LoRA adapter's folder, its base, and the logits of the two together."""
    base = checkpoint("deepseek_v2")
    model = AutoModelForCausalLM.from_pretrained(base.write())
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_b_proj", "o_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", base, logits_of(tuned.eval())


def test_an_adapters_folder_loads_base_and_adapter(adapter):
    folder, base, expected = adapter
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base.folder))
    assert not torch.allclose(plain, expected, **TOLERANCE)
    for auto in (AutoModelForCausalLM, DeepseekV2ForCausalLM):
        assert torch.equal(logits_of(auto.from_pretrained(folder)), expected)


def test_an_adapters_base_is_checked(adapter):
    folder, base, _ = adapter
    del base.tensors[NORM]
    base.write()
    for auto in (AutoModelForCausalLM, DeepseekV2ForCausalLM):
        assert f"Tensors 1 missing: {NORM}." in refusal(auto.from_pretrained, folder)


# Over HTTP


def test_a_hub_repository_over_http(checkpoint, tmp_path):
    """Real bytes from a server that speaks the Hub's protocol, and back by `push_to_hub`."""
    hub = LocalHub(tmp_path / "repositories")
    folder = checkpoint("deepseek_v3").write(shards=3)
    shutil.copytree(folder, hub.root / "owner" / "tiny")
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "NO_PROXY": "127.0.0.1"}
    try:
        script = Path(__file__).with_name("hub_client.py")
        command = [sys.executable, script, "owner/tiny", "owner/pushed", tmp_path / "logits.safetensors"]
        subprocess.run(command, check=True, env=environment)
    finally:
        hub.shutdown()
    assert sorted(name for name in hub.downloads if "of-00003" in name) == [
        f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)
    ]
    pushed = hub.root / "owner" / "pushed"
    assert (pushed / "model.safetensors.index.json").exists()
    original = load_file(GOLDEN / "deepseek_v3" / "model.safetensors")
    assert_same_tensors(
        tensors_in(pushed), {name: tensor for name, tensor in original.items() if name not in MTP_COPIES}
    )
    logits = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(16)[None]).logits
    torch.testing.assert_close(logits["loaded"], expected, **TOLERANCE)
    assert torch.equal(logits["pushed"], logits["loaded"])
