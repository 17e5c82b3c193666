"""Agreement with DeepSeek's published code: every golden of `tests/fixtures/golden` (see its README for what ran).

Float32 agreement between machines was within 2e-5 of logits of magnitude 5 when the goldens were made; 5e-5 leaves
room for another order of summation, and is far below what any mistake in the formulas would cause.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import deepseek_hf.modeling  # noqa: F401  (registers the model types)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
TOLERANCE = {"atol": 5e-5, "rtol": 0}
ALL = ["deepseek_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v3_fp8"]
PADDED = ["deepseek_moe", "deepseek_v2", "deepseek_v2_lite"]
TRAINED = PADDED


@pytest.fixture(params=["eager", "sdpa"])
def attn_implementation(request):
    return request.param


def load(name, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, **kwargs)
    return model, load_file(GOLDEN / name / "expected.safetensors")


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_and_last_hidden_state(name, attn_implementation):
    model, expected = load(name, attn_implementation=attn_implementation)
    output = model(expected["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected["logits"], **TOLERANCE)
    torch.testing.assert_close(output.hidden_states[-1], expected["last_hidden_state"], **TOLERANCE)


@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_left_padded_logits(name, attn_implementation):
    model, expected = load(name, attn_implementation=attn_implementation)
    mask = expected["padded.attention_mask"]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(expected["input_ids"], attention_mask=mask, position_ids=position_ids).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected["padded.logits"][real], **TOLERANCE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("chunks", [[1] * 40, [20] + [1] * 20, [7, 13, 1, 19]], ids=["tokens", "prefill", "chunked"])
@torch.no_grad()
def test_cached_decoding(name, chunks, attn_implementation):
    model, expected = load(name, attn_implementation=attn_implementation)
    cache = DynamicCache(config=model.config)
    logits = [
        model(piece, past_key_values=cache, use_cache=True).logits for piece in expected["input_ids"].split(chunks, 1)
    ]
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)
    if "decode.logits_from_19" in expected:  # the published absorbed cache
        torch.testing.assert_close(logits[:, 19:], expected["decode.logits_from_19"], **TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens(name, attn_implementation):
    model, expected = load(name, attn_implementation=attn_implementation)
    prompt, continued = expected["greedy.input_ids"], expected["greedy.output_ids"]
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=continued.shape[1],
        do_sample=False,
        eos_token_id=None,
    )
    assert tokens.tolist() == continued.tolist()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_router(name):
    model, expected = load(name)
    chosen = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(
                lambda _, __, output, index=index: chosen.__setitem__(index, output[1:])
            )
    model(expected["input_ids"])
    layers = [int(key.split(".")[1]) for key in expected if key.endswith("topk_index")]
    assert layers
    for layer in layers:
        weight, index = chosen[layer]
        index, order = index.sort(dim=-1)
        assert index.tolist() == expected[f"router.{layer}.topk_index"].tolist()
        torch.testing.assert_close(weight.gather(1, order), expected[f"router.{layer}.topk_weight"], **TOLERANCE)


@pytest.mark.parametrize("name", TRAINED)
def test_loss_balance_loss_and_gradients(name, attn_implementation):
    model, expected = load(name, attn_implementation=attn_implementation)
    model.train()
    output = model(expected["input_ids"], labels=expected["input_ids"])
    aux_losses = [value for key, value in expected.items() if key.startswith("train.aux_loss.")]
    torch.testing.assert_close(output.aux_loss, torch.stack(aux_losses).sum(), **TOLERANCE)
    torch.testing.assert_close(output.loss - output.aux_loss, expected["train.loss"], **TOLERANCE)

    output.loss.backward()
    gradients = official_gradients(model)
    wanted = {key.removeprefix("grad."): value for key, value in expected.items() if key.startswith("grad.")}
    assert wanted and wanted.keys() <= gradients.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(gradients[key], value, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


def official_gradients(model):
    """The gradients under the official names, one tensor per expert."""
    gradients = {}
    for name, parameter in model.named_parameters():
        prefix, _, projection = name.rpartition(".")
        if projection == "gate_up_proj":
            for expert, gradient in enumerate(parameter.grad):
                for half, value in zip(("gate_proj", "up_proj"), gradient.chunk(2), strict=True):
                    gradients[f"{prefix}.{expert}.{half}.weight"] = value
        elif projection == "down_proj":
            gradients |= {f"{prefix}.{expert}.down_proj.weight": value for expert, value in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return gradients


@torch.no_grad()
def test_multi_token_prediction(attn_implementation):
    model, expected = load("deepseek_v3", attn_implementation=attn_implementation)
    output = model(expected["input_ids"], labels=expected["input_ids"], output_mtp_logits=True)
    (mtp_logits,) = output.mtp_logits
    torch.testing.assert_close(mtp_logits, expected["mtp.logits"], **TOLERANCE)
    torch.testing.assert_close(output.mtp_loss, expected["mtp.loss"], **TOLERANCE)
    torch.testing.assert_close(output.loss, expected["main.loss"], **TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_saved_again_the_checkpoint_is_the_same(name, tmp_path):
    model, expected = load(name)
    model.save_pretrained(tmp_path)
    before, after = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    scales = {key for key in before if key.endswith("_scale_inv")}
    # Dequantised weights are saved as they are; embedding and head are not repeated in the MTP layers.
    copies = {key for key in before if key.endswith(("shared_head.head.weight", "layers.3.embed_tokens.weight"))}
    assert after.keys() == before.keys() - scales - copies
    for key, value in after.items():
        if f"{key}_scale_inv" not in scales:
            assert torch.equal(value, before[key]), key
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == json.loads((GOLDEN / name / "config.json").read_text())["architectures"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(expected["input_ids"]).logits, expected["logits"], **TOLERANCE)
