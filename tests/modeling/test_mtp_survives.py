"""Nothing of the MTP layers is lost between a base checkpoint and what is made of it, and others can draft with it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from small_models import drafting_model, random_ids, small_model
from test_checkpoint import SCALE, Checkpoint, quantized
from transformers_drafting import SETTINGS, prompt

from deepseek_hf.modeling import DeepseekV3ForCausalLM

TUNED = ("eh_proj.weight", "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight", "mlp.experts.gate_up_proj")


@pytest.fixture(params=["whole", "sharded", "fp8"])
def base(request, tmp_path) -> Path:
    """A checkpoint with one MTP layer, `model.layers.3`."""
    if request.param == "fp8":
        fp8 = Checkpoint("deepseek_v3", tmp_path / "base")
        fp8.config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        for name in [name for name in fp8.tensors if re.search(r"experts.*proj|self_attn.*proj|eh_proj", name)]:
            fp8.tensors[name], fp8.tensors[name + SCALE] = quantized(fp8.tensors[name])
        return fp8.write()
    folder = tmp_path / "base"
    size = "20KB" if request.param == "sharded" else "1GB"
    small_model("v3", num_nextn_predict_layers=1).save_pretrained(folder, max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (request.param == "sharded")
    return folder


def adapted(model: DeepseekV3ForCausalLM) -> PeftModel:
    """LoRA on attention, experts and `eh_proj` of the MTP layer, and on the main model's attention."""
    config = LoraConfig(
        r=2,
        target_modules=["eh_proj", "kv_b_proj", "o_proj"],
        target_parameters=["layers.3.mlp.experts.gate_up_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def trained(model: PeftModel) -> PeftModel:
    """After some steps on the joint loss."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for seed in range(2):
        ids = random_ids(2, 12, seed=seed)
        model(ids, labels=ids, output_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def mtp_tensors(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".layers.3." in name}


def test_through_lora_merge_save_and_load(base, tmp_path):
    model = DeepseekV3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = mtp_tensors(model)
    tuned = trained(adapted(model))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded.state_dict(), merged.state_dict(), rtol=0, atol=0)
    after = mtp_tensors(loaded)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name.endswith(TUNED):
            assert (tensor - before[name]).abs().max() > 1e-5, name
        else:
            assert torch.equal(tensor, before[name]), name

    # The adapter alone, on a base loaded anew, makes the same of it.
    again = PeftModel.from_pretrained(
        DeepseekV3ForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    torch.testing.assert_close(mtp_tensors(again.merge_and_unload()), after, rtol=0, atol=1e-6)

    ids = random_ids(1, 9)
    plain = loaded.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    drafted = loaded.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_mtp=True)
    assert drafted.tolist() == plain.tolist()


# What the loaders of other engines look up, for an MTP layer N of a model with N hidden layers. Both read everything
# below `model.layers.N.`; these names are not those of a decoder layer.
# vLLM: `DeepSeekMTP` in vllm/model_executor/models/deepseek_mtp.py; SGLang: `load_weights(is_nextn=True)` in
# python/sglang/srt/models/deepseek_v2.py. The official files also hold copies of the embedding and the output head,
# `embed_tokens.weight` and `shared_head.head.weight`, which some versions of vLLM read and which we do not write: those
# versions need `model.embed_tokens.weight` and `lm_head.weight` copied to these names.
OF_MTP = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
OF_DECODER_LAYER = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_a_proj.weight",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"mlp.experts.{i}.{name}_proj.weight" for i in range(8) for name in ("gate", "up", "down")),
}


def test_names_that_vllm_and_sglang_load(tmp_path):
    small_model("v3", num_nextn_predict_layers=2).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    for layer in (3, 4):
        prefix = f"model.layers.{layer}."
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == OF_MTP | OF_DECODER_LAYER
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 2


def test_transformers_drafts_with_what_we_save(tmp_path):
    """transformers 5.23 looks for one MTP layer, at 61, where DeepSeek-V3 has it. Its forwards are as many as ours: so
    its drafts are the same."""
    model = drafting_model("v3", 1, num_hidden_layers=61, scale=0.01)
    model.save_pretrained(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("transformers_drafting.py")), str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    ids = prompt()
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **SETTINGS)
    assert theirs["tokens"] == ours.sequences.tolist()
    assert theirs["forwards"] == 1 + ours.statistics.main_forwards
    assert 0 < ours.statistics.acceptance_rate < 1
