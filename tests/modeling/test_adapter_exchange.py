"""Adapters of the routed experts are PEFT's own files: saved here they load on transformers' classes, and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import small_model
from transformers import AutoModelForCausalLM
from transformers_process import input_ids

# Both compute in float32, in another order, and one of them with merged weights; the logits reach 10.
TOLERANCE = {"atol": 1e-4, "rtol": 0}
TARGETS = {
    "experts": {"target_modules": []},
    "experts and attention": {"target_modules": ["o_proj", "kv_b_proj"]},
}
CASES = [(family, name) for family in ("v2", "v3") for name in TARGETS]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> Path:
    """A folder a case, each with what `transformers_adapter_process.py` adds."""
    root = tmp_path_factory.mktemp("adapters")
    folders = [root / f"{family} {name}" for family, name in CASES]
    for folder, (family, name) in zip(folders, CASES, strict=True):
        model = small_model(family)
        model.save_pretrained(folder / "base")
        config = LoraConfig(
            r=4,
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
            **TARGETS[name],
        )
        get_peft_model(model, config).save_pretrained(folder / "adapter")
    script = Path(__file__).with_name("transformers_adapter_process.py")
    subprocess.run([sys.executable, script, *folders], check=True)
    return root


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize(("adapter", "logits"), [("adapter", "."), ("theirs", "theirs")])
@torch.no_grad()
def test_same_logits_as_transformers(exchanged, family, name, adapter, logits):
    folder = exchanged / f"{family} {name}"
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert type(base).__module__.startswith("deepseek_hf")
    untuned = base(input_ids()).logits
    model = PeftModel.from_pretrained(base, folder / adapter).eval()
    expected = load_file(folder / logits / "logits.safetensors")["logits"]
    tuned = model(input_ids()).logits
    assert (tuned - untuned).abs().max() > 0.5
    torch.testing.assert_close(tuned, expected, **TOLERANCE)
    torch.testing.assert_close(model.merge_and_unload()(input_ids()).logits, expected, **TOLERANCE)
