"""Agreement with transformers' own DeepSeek-V2 and -V3: the same weights give the same logits, from files either way.

Left out are the settings that transformers 5.23 gets wrong: V2 with `norm_topk_prob`, `moe_layer_freq` other than 1,
MTP layers, and FP8 whose dimensions do not divide by 128. Left out too is V3 with one expert a token: transformers
divides its weight by itself, DeepSeek's published class does not.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as TheirV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM as TheirV2
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as TheirV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as TheirV3
from transformers_process import input_ids, randomize

from deepseek_hf.modeling import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

# Both compute in float32, in another order. The logits reach 5 to 7; the largest difference seen was 2.2e-5.
TOLERANCE = {"atol": 5e-5, "rtol": 0}

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
BOTH = {
    "as above": {},
    "queries not compressed": {"q_lora_rank": None},
    "values narrower": {"v_head_dim": 12},
    "values wider": {"v_head_dim": 28, "q_lora_rank": None},
    "YaRN": {"rope_parameters": YARN},
    "YaRN, two mscales": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}},
    "YaRN, no mscale": {"rope_parameters": {name: YARN[name] for name in YARN if "mscale" not in name}},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "rope dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 12,
    },
    "all layers mixtures": {"first_k_dense_replace": 0},
    "two dense layers": {"first_k_dense_replace": 2},
    "all layers dense": {"first_k_dense_replace": 3},
    "two shared experts": {"n_shared_experts": 2},
    "one expert a token": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    "weights scaled": {"routed_scaling_factor": 3.5},
    "biases": {"attention_bias": True},
    "biases, queries not compressed": {"attention_bias": True, "q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 1e-2},
    "another activation": {"hidden_act": "gelu"},
}
V2 = BOTH | {
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "one group of two": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "groups of one": {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 4},
}
V3_ROUTING = {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0}
V3 = {name: V3_ROUTING | fields for name, fields in BOTH.items()} | {
    "one expert a token": V3_ROUTING | {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "one group": V3_ROUTING | {"n_group": 1, "topk_group": 1},
    "one group of two": V3_ROUTING | {"n_group": 2, "topk_group": 1},
    "weights as they are": V3_ROUTING | {"norm_topk_prob": False},
    "half-split RoPE": V3_ROUTING | {"rope_interleave": False},
    "half-split RoPE, YaRN": V3_ROUTING | {"rope_interleave": False, "rope_parameters": YARN},
}
GRID = [("v2", name) for name in V2] + [("v3", name) for name in V3]
CLASSES = {"v2": (TheirV2Config, TheirV2, DeepseekV2ForCausalLM), "v3": (TheirV3Config, TheirV3, DeepseekV3ForCausalLM)}


def their_config(family: str, name: str):
    return CLASSES[family][0](**SIZES | {"v2": V2, "v3": V3}[family][name])


@pytest.fixture(params=GRID, ids="-".join)
def pair(request):
    """Transformers' model and ours, with the same configuration file and weights."""
    family, name = request.param
    _, their_class, our_class = CLASSES[family]
    config = their_config(family, name)
    theirs = their_class(config).eval()
    randomize(theirs)
    ours = our_class(our_class.config_class.from_dict(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())  # by name, all of them
    return theirs, ours


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_logits(pair, attn_implementation):
    theirs, ours = pair
    for model in pair:
        model.set_attn_implementation(attn_implementation)
    expected = theirs(input_ids()).logits
    assert 2 < expected.abs().max() < 50  # what the tolerance refers to
    torch.testing.assert_close(ours(input_ids()).logits, expected, **TOLERANCE)

    mask = torch.ones_like(input_ids())
    mask[1, :5] = 0  # padded on the left
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = [model(input_ids(), attention_mask=mask, position_ids=position_ids).logits for model in (ours, theirs)]
    torch.testing.assert_close(*(logits[mask.bool()] for logits in padded), **TOLERANCE)


@torch.no_grad()
def test_cached_decoding(pair):
    theirs, ours = pair
    pieces = input_ids().split([11, 1, 1, 4, 1, 1, 1], dim=1)

    def decode(model):
        cache = DynamicCache(config=model.config)
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)

    torch.testing.assert_close(decode(ours), decode(theirs), **TOLERANCE)


@pytest.mark.parametrize(("family", "name"), [("v2", "groups"), ("v3", "YaRN")])
def test_greedy_tokens(family, name):
    _, their_class, our_class = CLASSES[family]
    theirs = their_class(their_config(family, name)).eval()
    randomize(theirs)
    ours = our_class(our_class.config_class.from_dict(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = [
        model.generate(input_ids(), attention_mask=torch.ones_like(input_ids()), max_new_tokens=30, do_sample=False)
        for model in (ours, theirs)
    ]
    assert tokens[0].tolist() == tokens[1].tolist()


# Files, with transformers in a process that has never heard of this project

FROM_OURS = {
    "v2 groups": ("v2", V2["groups"], {}),
    "v2 queries not compressed": ("v2", V2["queries not compressed"], {}),
    "v2 tied": ("v2", V2["tied"], {}),
    "v2 sharded": ("v2", V2["biases"], {"max_shard_size": "30KB"}),
    "v3": ("v3", V3["YaRN"], {}),
    "v3 sharded": ("v3", V3["biases"], {"max_shard_size": "30KB"}),
    "v3 with MTP": ("v3", V3["as above"] | {"num_nextn_predict_layers": 2}, {}),
    "v3 bfloat16": ("v3", V3["as above"] | {"dtype": "bfloat16"}, {}),
}
FROM_THEIRS = [("v2", "groups"), ("v2", "tied"), ("v2", "biases"), ("v3", "YaRN"), ("v3", "queries not compressed")]


def logits_in(folder: Path) -> torch.Tensor:
    return load_file(folder / "logits.safetensors")["logits"]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Two folders of checkpoints, ours and transformers', each with the logits that transformers gets from it."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    for name, (family, fields, saving) in FROM_OURS.items():
        model_class = CLASSES[family][2]
        model = model_class(model_class.config_class(**SIZES | fields))
        randomize(model)
        model.to(model.config.dtype or torch.float32).save_pretrained(ours / name, **saving)
    for family, name in FROM_THEIRS:
        their_config(family, name).save_pretrained(theirs / f"{family} {name}")
    script = Path(__file__).with_name("transformers_process.py")
    subprocess.run([sys.executable, script, ours, theirs], check=True)
    return ours, theirs


@pytest.mark.parametrize("name", FROM_OURS)
@torch.no_grad()
def test_transformers_reads_ours(name, exchanged):
    folder = exchanged[0] / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(input_ids()).logits, logits_in(folder), **TOLERANCE)


@pytest.mark.parametrize(("family", "name"), FROM_THEIRS)
@torch.no_grad()
def test_transformers_checkpoints_are_read(family, name, exchanged):
    folder = exchanged[1] / f"{family} {name}"
    assert (folder / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is CLASSES[family][2]
    torch.testing.assert_close(model(input_ids()).logits, logits_in(folder), **TOLERANCE)
