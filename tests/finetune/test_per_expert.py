"""Adapters with one LoRA an expert. What an engine computes from them is written out here, from the engines' naming."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from deepseek_hf.finetune.adapter import add_adapter
from deepseek_hf.finetune.esft import EXPERT_CONFIG_NAME, ExpertConfig, load_esft, specialize
from deepseek_hf.finetune.per_expert import export_per_expert, import_per_expert
from deepseek_hf.modeling import DeepseekV3ForCausalLM

IDS = torch.arange(5, 45).unsqueeze(0)
PREFIX = "base_model.model."
# float32: merged weights against factors, in another order; the logits reach 0.5.
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


@torch.no_grad()
def as_an_engine_reads_it(model: DeepseekV3ForCausalLM, folder) -> DeepseekV3ForCausalLM:
    """Adds (lora_alpha / r) · lora_B · lora_A to each module's matrix, by its name in the official checkpoints."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        assert module.rpartition(".")[2] in config["target_modules"]
        delta = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * (config["lora_alpha"] / config["r"])
        expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)", module)
        if expert is None:
            model.get_submodule(module).weight += delta
            continue
        experts, row = model.get_submodule(expert[1]), int(expert[2])
        gate, up = experts.gate_up_proj[row].chunk(2)
        {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj[row]}[expert[3]].add_(delta)
    return model


def fresh(config) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    ("targets", "arguments"),
    [
        (["experts"], {}),
        (["all", "router"], {}),
        (["all"], {"use_rslora": True, "rank_pattern": {"experts.down_proj": 2, "o_proj": 3}}),
        (["experts"], {"target_parameters": ["mlp.experts.down_proj"]}),
        (["experts"], {"target_parameters": ["mlp.experts.gate_up_proj"], "alpha_pattern": {"gate_up_proj": 5}}),
    ],
)
@pytest.mark.filterwarnings("ignore:lora_targets", "ignore:The following")
def test_engines_get_the_same_model(config, tmp_path, targets, arguments):
    model = add_adapter(fresh(config), 4, 8, targets, init_lora_weights=False, **arguments)
    expected = logits(model)
    assert (expected - logits(fresh(config))).abs().max() > 0.1
    model.save_pretrained(tmp_path / "peft")
    export_per_expert(tmp_path / "peft", tmp_path / "engine")
    torch.testing.assert_close(logits(as_an_engine_reads_it(fresh(config), tmp_path / "engine")), expected, **TOLERANCE)

    import_per_expert(tmp_path / "engine", tmp_path / "back", num_experts=4)
    back = PeftModel.from_pretrained(fresh(config), tmp_path / "back")
    torch.testing.assert_close(logits(back), expected, **TOLERANCE)


def test_names_and_shapes(config, tmp_path):
    add_adapter(fresh(config), 4, 8, ["experts"]).save_pretrained(tmp_path / "peft")
    export_per_expert(tmp_path / "peft", tmp_path / "engine")
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / "engine/adapter_model.safetensors").items()}
    experts = f"{PREFIX}model.layers.1.mlp.experts"
    assert len(shapes) == 4 * 3 * 2
    assert shapes[f"{experts}.0.gate_proj.lora_A.weight"] == [4, 64]
    assert shapes[f"{experts}.3.up_proj.lora_B.weight"] == [32, 4]
    assert shapes[f"{experts}.2.down_proj.lora_A.weight"] == [4, 32]


def test_gate_and_up_with_factors_of_their_own(config, tmp_path):
    """As other trainers write them, and not for every expert."""
    add_adapter(fresh(config), 4, 8, ["experts"]).save_pretrained(tmp_path / "peft")
    export_per_expert(tmp_path / "peft", tmp_path / "engine")
    path = tmp_path / "engine/adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator) / 4 for name, t in load_file(path).items()}
    save_file({name: t for name, t in tensors.items() if ".experts.2." not in name}, path)
    expected = logits(as_an_engine_reads_it(fresh(config), tmp_path / "engine"))
    import_per_expert(tmp_path / "engine", tmp_path / "back", num_experts=4)
    back = PeftModel.from_pretrained(fresh(config), tmp_path / "back")
    torch.testing.assert_close(logits(back), expected, **TOLERANCE)


def test_experts_chosen_by_esft(config, tmp_path):
    chosen = ExpertConfig({1: [3, 1]})
    model = add_adapter(specialize(fresh(config), chosen), 4, 8, ["experts"], init_lora_weights=False)
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    chosen.write(tmp_path / "peft")
    torch.testing.assert_close(logits(load_esft(fresh(config), tmp_path / "peft")), expected, rtol=0, atol=0)

    export_per_expert(tmp_path / "peft", tmp_path / "engine")
    names = load_file(tmp_path / "engine/adapter_model.safetensors")
    assert {re.search(r"experts\.(\d+)", name)[1] for name in names} == {"1", "3"}
    torch.testing.assert_close(logits(as_an_engine_reads_it(fresh(config), tmp_path / "engine")), expected, **TOLERANCE)
    import_per_expert(tmp_path / "engine", tmp_path / "back", num_experts=4)
    assert not (tmp_path / "back" / EXPERT_CONFIG_NAME).exists()
    back = PeftModel.from_pretrained(fresh(config), tmp_path / "back")
    torch.testing.assert_close(logits(back), expected, **TOLERANCE)


def test_what_does_not_fit_is_named(config, tmp_path):
    add_adapter(fresh(config), 4, 8, ["attention"]).save_pretrained(tmp_path / "attention")
    with pytest.raises(ValueError, match="adapts no routed experts"):
        export_per_expert(tmp_path / "attention", tmp_path / "engine")
    add_adapter(fresh(config), 4, 8, ["experts"]).save_pretrained(tmp_path / "peft")
    export_per_expert(tmp_path / "peft", tmp_path / "engine")
    with pytest.raises(ValueError, match=r"experts\.3\..*accepted: .* of the experts 0 to 2"):
        import_per_expert(tmp_path / "engine", tmp_path / "back", num_experts=3)
