import json

import pytest
import torch
from safetensors.torch import load_file

from deepseek_hf.finetune.esft import (
    EXPERT_CONFIG_NAME,
    ExpertConfig,
    SpecializedExperts,
    fold,
    load_esft,
    save_esft,
    specialize,
)
from deepseek_hf.modeling import DeepseekV3ForCausalLM

IDS = torch.arange(5, 45).view(2, 20)
CHOSEN = {1: [3, 0]}


def fresh(config) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def trained_a_step(model: DeepseekV3ForCausalLM) -> DeepseekV3ForCausalLM:
    """One AdamW step over what requires a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model


def test_published_form(tmp_path):
    text = '{"experts": {"1": [12, 40], "10": [5]}, "shared_experts": false, "non_expert_modules": true}'
    (tmp_path / "law.json").write_text(text)
    config = ExpertConfig.read(tmp_path / "law.json")
    assert config == ExpertConfig({1: [12, 40], 10: [5]}, shared_experts=False, non_expert_modules=True)
    config.write(tmp_path)
    assert json.loads((tmp_path / EXPERT_CONFIG_NAME).read_text()) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"shared_experts": false}', '{"experts": {"one": [1]}}', '{"experts": {}, "experts_": 1}']
)
def test_other_forms_are_refused(tmp_path, text):
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(ValueError, match=r"law.json does not name experts .*accepted: \{\"experts\""):
        ExpertConfig.read(tmp_path / "law.json")


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({1: []}, "expert_config names no expert"),
        ({0: [1]}, "layer 0 has no routed experts .*accepted layers: 1 to 1"),
        ({2: [1]}, "layer 2 has no routed experts .*num_hidden_layers is 2"),  # the MTP layer
        ({1: [4]}, "layer 1, expert 4 is out of range; accepted: each of 0 to 3 once"),
        ({1: [-1]}, "expert -1 is out of range"),
        ({1: [2, 2]}, "expert 2 is twice"),
    ],
)
def test_what_the_model_has_not_is_named(model, experts, message):
    with pytest.raises(ValueError, match=message):
        specialize(model, ExpertConfig(experts))


def test_same_model_until_trained(config):
    torch.testing.assert_close(logits(specialize(fresh(config), ExpertConfig(CHOSEN))), logits(fresh(config)))


def test_same_gradients_as_training_all_weights(config):
    whole, some = fresh(config).train(), specialize(fresh(config), ExpertConfig(CHOSEN)).train()
    for model in (whole, some):
        model(IDS, labels=IDS).loss.backward()
    experts = whole.model.layers[1].mlp.experts
    own = {name: p for name, p in some.named_parameters() if p.requires_grad}
    prefix = "model.layers.1.mlp.experts.specialized_"
    assert own.keys() == {f"{prefix}gate_up_proj", f"{prefix}down_proj"}
    for name in ("gate_up_proj", "down_proj"):
        expected = getattr(experts, name).grad[CHOSEN[1]]
        # float32 in the other order of the experts interface's grouped products
        torch.testing.assert_close(own[prefix + name].grad, expected, rtol=1e-4, atol=1e-7)


def test_gradients_and_optimizer_states_are_of_the_chosen_alone(config):
    model = specialize(fresh(config), ExpertConfig(CHOSEN))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 3 * 32 * 64  # experts · matrices · I · H
    optimizer = torch.optim.AdamW(trained)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == 2 * 3 * 32 * 64
    assert (
        sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim()) == 2 * 2 * 3 * 32 * 64
    )


@pytest.mark.parametrize(("shared_experts", "non_expert_modules"), [(False, False), (True, False), (False, True)])
def test_what_was_trained_is_saved_and_loads_onto_the_base(config, tmp_path, shared_experts, non_expert_modules):
    expert_config = ExpertConfig(CHOSEN, shared_experts, non_expert_modules)
    model = trained_a_step(specialize(fresh(config), expert_config))
    base = fresh(config)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.01
    save_esft(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    experts = {f"layers.1.mlp.experts.{e}.{p}.weight" for e in (0, 3) for p in ("gate_proj", "up_proj", "down_proj")}
    assert experts <= names
    rest = names - experts
    assert all("shared_experts" in name for name in rest) or non_expert_modules
    assert bool(rest) == (shared_experts or non_expert_modules)
    assert not any(name.startswith("layers.2.") for name in names)  # the MTP layer
    assert ("embed_tokens.weight" in names) == non_expert_modules

    loaded = load_esft(base, tmp_path)
    assert not any(isinstance(module, SpecializedExperts) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.state_dict(), fold(model).state_dict(), rtol=0, atol=0)


def test_folded_model_saves_as_any_other(config, tmp_path):
    model = trained_a_step(specialize(fresh(config), ExpertConfig(CHOSEN)))
    expected = logits(model)
    fold(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(DeepseekV3ForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-6)


def test_files_that_do_not_fit_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"holds no expert_cfg\.json"):
        load_esft(fresh(config), tmp_path)
    save_esft(specialize(fresh(config), ExpertConfig(CHOSEN)), tmp_path)
    ExpertConfig({1: [3, 1]}).write(tmp_path)
    with pytest.raises(ValueError, match=r"6 tensors are missing, superfluous or of another shape .*experts\.0"):
        load_esft(fresh(config), tmp_path)
