import pytest

from deepseek_hf.finetune.adapter import add_adapter, check_same_base

PREFIX = "base_model.model.model.layers."
ATTENTION = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE = {f"mlp.{name}" for name in PROJECTIONS}
SHARED = {f"mlp.shared_experts.{name}" for name in PROJECTIONS}
# PEFT nests the wrappers of one module's parameters: the outer is down_proj's, the inner gate_up_proj's.
EXPERTS = {"mlp.experts", "mlp.experts.base_layer"}


@pytest.mark.parametrize(
    ("targets", "dense_layer", "moe_layer"),
    [
        (["attention"], ATTENTION, ATTENTION),
        (["mlp"], DENSE, SHARED),
        (["experts"], set(), EXPERTS),
        (["attention", "mlp", "experts"], ATTENTION | DENSE, ATTENTION | SHARED | EXPERTS),
    ],
)
def test_what_is_trained(model, targets, dense_layer, moe_layer):
    """Also: neither the router nor the MTP layer, layer 2, is among it."""
    model = add_adapter(model, r=4, alpha=8, targets=targets)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"0.{name}" for name in dense_layer} | {f"1.{name}" for name in moe_layer}
    assert trained == {f"{PREFIX}{name}.lora_{half}.default.weight" for name in expected for half in "AB"}


def test_rank(model):
    model = add_adapter(model, r=4, alpha=8, targets=["attention", "mlp", "experts"])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes[f"{PREFIX}0.self_attn.o_proj.lora_A.default.weight"] == (4, 32)
    assert shapes[f"{PREFIX}1.mlp.shared_experts.up_proj.lora_A.default.weight"] == (4, 64)
    assert shapes[f"{PREFIX}1.mlp.experts.base_layer.lora_A.default.weight"] == (4 * 4, 64)  # of each of 4 experts


@pytest.fixture
def saved(model, tmp_path):
    model.name_or_path = str(tmp_path / "base")
    model = add_adapter(model, r=4, alpha=8, targets=["attention", "mlp"])
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
