import re

import pytest
import torch
from peft import PeftModel

from deepseek_hf.finetune.adapter import PRESETS, add_adapter, check_same_base, describe_adapter, load_adapter
from deepseek_hf.modeling import DeepseekV3ForCausalLM

PREFIX = "base_model.model.model.layers."
ATTENTION = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE = {f"mlp.{name}" for name in PROJECTIONS}
SHARED = {f"mlp.shared_experts.{name}" for name in PROJECTIONS}
# PEFT nests the wrappers of one module's parameters: the outer is down_proj's, the inner gate_up_proj's.
EXPERTS = {"mlp.experts", "mlp.experts.base_layer"}
MIXTURE = ATTENTION | SHARED | EXPERTS


@pytest.mark.parametrize(
    ("targets", "dense_layer", "moe_layer", "mtp_layer"),
    [
        (["attention"], ATTENTION, ATTENTION, set()),
        (["experts"], set(), EXPERTS, set()),
        (["shared_experts"], set(), SHARED, set()),
        (["attention", "experts"], ATTENTION, ATTENTION | EXPERTS, set()),
        (["all"], ATTENTION | DENSE, MIXTURE, set()),
        (["all+mtp"], ATTENTION | DENSE, MIXTURE, MIXTURE | {"eh_proj"}),
        (["router"], set(), {"mlp.gate"}, set()),
    ],
)
@pytest.mark.filterwarnings("ignore:lora_targets")
def test_what_is_trained(model, targets, dense_layer, moe_layer, mtp_layer):
    """Layer 0 is dense, layer 1 a mixture of experts, layer 2 the MTP layer."""
    model = add_adapter(model, r=4, alpha=8, targets=targets)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = enumerate((dense_layer, moe_layer, mtp_layer))
    expected = {f"{index}.{name}" for index, names in layers for name in names}
    assert trained == {f"{PREFIX}{name}.lora_{half}.default.weight" for name in expected for half in "AB"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:lora_targets")
def test_every_preset_trains(model, preset):
    """One step gives every one of its parameters a gradient (lora_A's is zero as long as lora_B is)."""
    model = add_adapter(model, r=2, alpha=4, targets=[preset], init_lora_weights=False).train()
    ids = torch.arange(5, 45).view(2, 20)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    if preset == "router":
        assert model.get_base_model().collect_expert_load()[1].sum() == 40 * 2  # 2 experts a token


def test_router_comes_with_a_warning(model):
    with pytest.warns(UserWarning, match="lora_targets: router .* balance"):
        add_adapter(model, r=2, alpha=4, targets=["router"])


def test_description_says_what_presets_came_to(model):
    model = add_adapter(model, r=4, alpha=8, targets=["attention", "experts"])
    text = describe_adapter(model)
    assert "target_modules: kv_a_proj_with_mqa, kv_b_proj, o_proj, q_a_proj, q_b_proj" in text
    assert "target_parameters: model.layers.*.mlp.experts.gate_up_proj (1 layers)" in text
    trained, _ = model.get_nb_trainable_parameters()
    assert f"in all: {trained:,}, " in text
    # r · E · (H + 2I) + r · E · (I + H)
    assert f"trained in experts: {4 * 4 * (64 + 2 * 32) + 4 * 4 * (32 + 64):,} parameters" in text


def test_peft_arguments_pass_through(model):
    model = add_adapter(
        model, 4, 8, ["experts"], use_rslora=True, rank_pattern={"experts.down_proj": 2}, init_lora_weights="gaussian"
    )
    down = model.get_base_model().model.layers[1].mlp.experts
    assert (down.r["default"], down.scaling["default"]) == (2, 8 / 2**0.5)
    assert down.base_layer.r["default"] == 4


def test_dora_on_modules(model):
    model = add_adapter(model, 4, 8, ["attention"], use_dora=True, lora_dropout=0.1)
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "arguments", "message"),
    [
        (["mlp"], {}, r"lora_targets=\['mlp'\]; accepted: attention, experts"),
        (["experts"], {"lora_dropout": 0.1}, r"lora_dropout=0.1 is not possible for parameters.*accepted: 0.0"),
        (["all"], {"use_dora": True}, "use_dora=True is not possible for parameters"),
        (["experts"], {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .*accepted: True, False, 'gaussian'"),
        (["attention"], {"use_rlora": True}, "no field 'use_rlora'; did you mean use_rslora"),
    ],
)
def test_what_peft_cannot_do_is_named(model, targets, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(model, 4, 8, targets, **arguments)


@pytest.mark.parametrize(
    ("changes", "preset", "field"),
    [
        ({"n_routed_experts": None}, "experts", "n_routed_experts"),
        ({"n_routed_experts": None}, "router", "n_routed_experts"),
        ({"n_shared_experts": None}, "shared_experts", "n_shared_experts"),
        ({"num_nextn_predict_layers": 0}, "all+mtp", "num_nextn_predict_layers"),
    ],
)
def test_preset_without_its_layers(config, changes, preset, field):
    if "n_routed_experts" in changes:
        changes = changes | {"num_nextn_predict_layers": 0, "n_shared_experts": None}
    model = DeepseekV3ForCausalLM(type(config).from_dict(config.to_dict() | changes))
    with pytest.raises(ValueError, match=f"lora_targets: {re.escape(preset)} finds nothing.*{field} is"):
        add_adapter(model, 4, 8, [preset])


def other_depth(config, num_hidden_layers: int) -> DeepseekV3ForCausalLM:
    fields = config.to_dict() | {"num_hidden_layers": num_hidden_layers, "num_nextn_predict_layers": 0}
    return DeepseekV3ForCausalLM(type(config).from_dict(fields))


def test_loaded_adapter_must_have_the_models_layers(config, tmp_path):
    model = add_adapter(other_depth(config, 3), 4, 8, ["attention", "experts"])
    model.save_pretrained(tmp_path)
    assert isinstance(load_adapter(other_depth(config, 3), str(tmp_path)), PeftModel)
    with pytest.raises(ValueError, match="adapts layer 2, and the model ends with layer 1"):
        load_adapter(other_depth(config, 2), str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(other_depth(config, 2), str(tmp_path / "nowhere"))


def test_loaded_adapter_of_fewer_layers(config, tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # of all layers, however many
    model = add_adapter(other_depth(config, 2), 4, 8, ["experts"], target_parameters=names)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4 of the adapter's tensors are missing in the file"):
        load_adapter(other_depth(config, 3), str(tmp_path))


def test_rank(model):
    model = add_adapter(model, r=4, alpha=8, targets=["all"])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes[f"{PREFIX}0.self_attn.o_proj.lora_A.default.weight"] == (4, 32)
    assert shapes[f"{PREFIX}1.mlp.shared_experts.up_proj.lora_A.default.weight"] == (4, 64)
    assert shapes[f"{PREFIX}1.mlp.experts.base_layer.lora_A.default.weight"] == (4 * 4, 64)  # of each of 4 experts


@pytest.fixture
def saved(model, tmp_path):
    model.name_or_path = str(tmp_path / "base")
    model = add_adapter(model, r=4, alpha=8, targets=["attention", "shared_experts"])
    model.save_pretrained(tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


def test_own_adapter_is_accepted(saved):
    model, folder = saved
    check_same_base(folder, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_model_name_or_path", "another"), ("r", 8), ("lora_alpha", 4), ("target_modules", {"o_proj"})],
)
def test_other_adapter_is_refused(saved, field, value):
    model, folder = saved
    setattr(model.peft_config["default"], field, value)
    with pytest.raises(ValueError, match=f"its adapter has {field}="):
        check_same_base(folder, model)
