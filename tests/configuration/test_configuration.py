"""Published and transformers' own `config.json` files are read, kept and written back; impossible ones are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as TransformersV2Config
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as TransformersV3Config

import deepseek_hf.modeling  # noqa: F401  (registers the model types with AutoConfig)
from deepseek_hf.configuration import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from deepseek_hf.modeling import DeepseekForCausalLM, DeepseekV3ForCausalLM

CONFIGS = Path(__file__).parents[1] / "fixtures/configs"
PUBLISHED = {file.parent.name: file.parent for file in CONFIGS.glob("*/config.json")}
FAMILIES = {"deepseek": DeepseekConfig, "deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}
# Read into `rope_parameters` and `dtype`; the version is that of the library that saved last.
LEGACY = {"rope_scaling", "rope_theta", "torch_dtype", "transformers_version"}


@pytest.fixture(params=sorted(PUBLISHED))
def published(request):
    """Folder and fields of one published configuration."""
    folder = PUBLISHED[request.param]
    return folder, json.loads((folder / "config.json").read_text())


def test_every_family_is_among_the_published():
    types = {json.loads((folder / "config.json").read_text())["model_type"] for folder in PUBLISHED.values()}
    assert types == FAMILIES.keys()
    assert len(PUBLISHED) == 8


@pytest.mark.parametrize("auto", [True, False], ids=["AutoConfig", "class"])
def test_published_fields_are_read(published, auto):
    folder, fields = published
    family = FAMILIES[fields["model_type"]]
    config = (AutoConfig if auto else family).from_pretrained(folder)
    assert type(config) is family
    assert {name: getattr(config, name) for name in fields.keys() - LEGACY} == {
        name: fields[name] for name in fields.keys() - LEGACY
    }
    assert config.dtype == torch.bfloat16
    rope = config.rope_parameters
    assert rope["rope_theta"] == fields["rope_theta"]
    scaling = fields.get("rope_scaling") or {"type": "default"}
    assert rope["rope_type"] == scaling["type"]
    assert rope.items() >= {name: value for name, value in scaling.items() if name != "type"}.items()


def test_saved_again_nothing_is_lost(published, tmp_path):
    folder, fields = published
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    kept = fields.keys() - LEGACY
    assert {name: saved[name] for name in kept} == {name: fields[name] for name in kept}
    assert saved["dtype"] == fields["torch_dtype"]
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_unknown_fields_are_kept(tmp_path):
    DeepseekV3Config(ep_size=4, house_rules={"depth": [1, 2]}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.ep_size, config.house_rules) == (4, {"depth": [1, 2]})


# Parameters in billions as the model cards give them; the tolerance is half of the last digit given.
SIZES = {
    "deepseek-moe-16b-base": (16.4, 0.05),
    "DeepSeek-V2": (236, 0.5),
    "DeepSeek-V2-Lite": (15.7, 0.05),
    "DeepSeek-V3": (671, 0.5),
    "Moonlight-16B-A3B-Instruct": (16, 0.5),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_models_have_the_published_sizes(name):
    config = AutoConfig.from_pretrained(PUBLISHED[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mtp = sum(parameter.numel() for parameter in model.mtp_layers.parameters())
    main = sum(parameter.numel() for parameter in model.parameters()) - mtp
    published, tolerance = SIZES[name]
    assert main / 1e9 == pytest.approx(published, abs=tolerance)
    if name == "DeepSeek-V3":  # README_WEIGHTS.md: 11.5B, to which `eh_proj` adds 0.1B
        assert mtp / 1e9 == pytest.approx(11.5, rel=0.01)


def test_which_layers_are_mixtures():
    config = DeepseekV3Config(
        first_k_dense_replace=3, moe_layer_freq=2, num_hidden_layers=8, num_nextn_predict_layers=2
    )
    assert [layer for layer in range(10) if config.is_moe_layer(layer)] == [4, 6, 8, 9]
    dense = DeepseekConfig(n_routed_experts=None)
    assert not any(dense.is_moe_layer(layer) for layer in range(dense.num_hidden_layers))


# transformers' own configurations, with values that are nobody's default.
V2_FIELDS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 640,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 1.25,
    "first_k_dense_replace": 2,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 80,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.5,
        "mscale_all_dim": 0.75,
    },
}
V3_FIELDS = {name: value for name, value in V2_FIELDS.items() if name != "topk_method"} | {
    "num_nextn_predict_layers": 2,
    "norm_topk_prob": False,
    "rope_interleave": False,
}


@pytest.mark.parametrize(
    ("theirs", "ours", "fields"),
    [(TransformersV2Config, DeepseekV2Config, V2_FIELDS), (TransformersV3Config, DeepseekV3Config, V3_FIELDS)],
    ids=["v2", "v3"],
)
def test_transformers_configurations_are_read(theirs, ours, fields, tmp_path):
    theirs(**fields).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ours
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.scoring_func == ("softmax" if ours is DeepseekV2Config else "sigmoid")
    assert config.topk_method == fields.get("topk_method", "noaux_tc")


def test_transformers_reads_ours(tmp_path):
    cases = {"v2": (DeepseekV2Config, V2_FIELDS), "v3": (DeepseekV3Config, V3_FIELDS)}
    for name, (ours, fields) in cases.items():
        ours(**fields, moe_layer_freq=2, mtp_loss_weight=0.1).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in cases]
    script = Path(__file__).with_name("transformers_own.py")
    read = json.loads(subprocess.run([sys.executable, script, *folders], check=True, stdout=subprocess.PIPE).stdout)
    for folder, (_, fields) in zip(folders, cases.values(), strict=True):
        # the field behind `num_nextn_predict_layers` has another name there
        renamed = {"num_mtp_layers": 2} if "num_nextn_predict_layers" in fields else {}
        expected = {name: value for name, value in fields.items() if name != "num_nextn_predict_layers"} | renamed
        found = read[folder]
        assert {name: found.get(name, found.get("num_nextn_predict_layers")) for name in expected} == expected
        assert (found["moe_layer_freq"], found["mtp_loss_weight"]) == (2, 0.1)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
IMPOSSIBLE = [
    (DeepseekV3Config, {"n_routed_experts": 250}, "n_group", 8, "a divisor of `n_routed_experts` (250)"),
    (DeepseekV3Config, {"n_group": 0}, "n_group", 0, "a divisor of `n_routed_experts` (256)"),
    (DeepseekV3Config, {"n_group": None}, "n_group", None, "a divisor of `n_routed_experts` (256)"),
    (DeepseekV3Config, {"n_group": 256, "num_experts_per_tok": 4}, "n_group", 256, "at most 128"),
    (DeepseekV3Config, {"topk_group": 9}, "topk_group", 9, "1 to `n_group` (8)"),
    (DeepseekV3Config, {"topk_group": None}, "topk_group", None, "1 to `n_group` (8)"),
    (DeepseekV3Config, {"num_experts_per_tok": 129}, "num_experts_per_tok", 129, "at most 128"),
    (DeepseekV2Config, {"num_experts_per_tok": 65}, "num_experts_per_tok", 65, "1 to `n_routed_experts` (64)"),
    (DeepseekV2Config, {"num_experts_per_tok": None}, "num_experts_per_tok", None, "1 to `n_routed_experts` (64)"),
    (DeepseekV2Config, {"num_experts_per_tok": 0}, "num_experts_per_tok", 0, "1 to `n_routed_experts` (64)"),
    (
        DeepseekV2Config,
        {"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 1},
        "n_group",
        5,
        "a divisor of `n_routed_experts` (64)",
    ),
    (DeepseekConfig, {"n_routed_experts": 0}, "n_routed_experts", 0, "at least 1, or None"),
    (DeepseekConfig, {"n_shared_experts": -1}, "n_shared_experts", -1, "at least 0, or None"),
    (DeepseekConfig, {"n_expert_devices": 7}, "n_expert_devices", 7, "a divisor of `n_routed_experts` (64)"),
    (DeepseekConfig, {"expert_capacity_factor": 0.0}, "expert_capacity_factor", 0.0, "above 0"),
    (DeepseekConfig, {"aux_loss_alpha": -0.1}, "aux_loss_alpha", -0.1, "at least 0"),
    (DeepseekConfig, {"moe_layer_freq": 0}, "moe_layer_freq", 0, "at least 1"),
    (DeepseekConfig, {"first_k_dense_replace": -1}, "first_k_dense_replace", -1, "at least 0"),
    (DeepseekV2Config, {"topk_method": "best"}, "topk_method", "best", "greedy, group_limited_greedy, noaux_tc"),
    (DeepseekV2Config, {"scoring_func": "relu"}, "scoring_func", "relu", "sigmoid, softmax"),
    (DeepseekV3Config, {"qk_rope_head_dim": 63}, "qk_rope_head_dim", 63, "a positive even number"),
    (DeepseekV3Config, {"head_dim": 128}, "head_dim", 128, "64, the rotated width `qk_rope_head_dim`"),
    (DeepseekConfig, {"head_dim": 17}, "head_dim", 17, "a positive even number"),
    (DeepseekConfig, {"num_attention_heads": 12}, "num_attention_heads", 12, "a divisor of `hidden_size` (2048)"),
    (DeepseekConfig, {"num_key_value_heads": 3}, "num_key_value_heads", 3, "a divisor of `num_attention_heads` (16)"),
    (DeepseekV3Config, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", -1, "at least 0"),
    (DeepseekV3Config, {"mtp_loss_weight": -0.3}, "mtp_loss_weight", -0.3, "at least 0"),
    (DeepseekV3Config, {"num_hidden_layers": 0}, "num_hidden_layers", 0, "at least 1"),
    (DeepseekV3Config, {"q_lora_rank": 0}, "q_lora_rank", 0, "at least 1"),
    (DeepseekV3Config, {"hidden_act": "swish2"}, "hidden_act", "swish2", "silu"),
    (
        DeepseekV3Config,
        {"rope_parameters": YARN | {"rope_type": "yam"}},
        "rope_parameters['rope_type']",
        "yam",
        "default, dynamic",
    ),
]


@pytest.mark.parametrize(
    ("family", "fields", "field", "value", "accepted"), IMPOSSIBLE, ids=[str(case[1])[1:-1] for case in IMPOSSIBLE]
)
def test_an_impossible_configuration_is_one_error(family, fields, field, value, accepted, tmp_path):
    family().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    if family is DeepseekConfig and "head_dim" not in fields:
        del stored["head_dim"]  # the official files have none
    (tmp_path / "config.json").write_text(json.dumps(stored | fields))
    for make in (lambda: family(**fields), lambda: family.from_pretrained(tmp_path)):
        with pytest.raises((ValueError, StrictDataclassError)) as error:
            make()
        message = str(error.value)
        assert f"`{field}` is {value!r}; accepted: " in message
        assert accepted in message
        assert message.count("accepted:") == 1


@pytest.mark.parametrize(
    ("family", "fields"),
    [(DeepseekV3Config, {"hidden_size": "wide"}), (DeepseekConfig, {"norm_topk_prob": None})],
    ids=["str", "None"],
)
def test_a_value_of_another_type_is_an_error(family, fields):
    ((field, value),) = fields.items()
    with pytest.raises(StrictDataclassError, match=rf"'{field}'.*\n.*expected (int|bool), got .* \(value: {value!r}\)"):
        family(**fields)


def test_a_trainers_predictions_are_the_logits(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(CONFIGS.parent / "golden" / "deepseek_v3")
    rows = [{"input_ids": list(range(start, start + 8)), "labels": list(range(start, start + 8))} for start in range(3)]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    prediction = Trainer(model, arguments).predict(rows)
    assert prediction.predictions.shape == (3, 8, 320)
    assert prediction.metrics["test_loss"] > 0


def test_fields_set_later_are_checked_when_a_model_is_built():
    config = DeepseekV3Config()
    config.num_experts_per_tok = 200
    with pytest.raises(ValueError, match="`num_experts_per_tok` is 200; accepted: at most 128"), torch.device("meta"):
        DeepseekV3ForCausalLM(config)
    config = DeepseekConfig()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="`num_key_value_heads` is 3"), torch.device("meta"):
        DeepseekForCausalLM(config)
