"""The ways to compute attention agree: eager, SDPA and flex; absorbed and expanded; cached and not; with adapters.

Tolerance: float32 logits of magnitude up to 10, computed in another order: 5e-5.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import FAMILIES, padded, random_ids, small_config, small_model

from deepseek_hf.configuration import DeepseekV3Config
from deepseek_hf.modeling.attention import MultiHeadLatentAttention

TOLERANCE = {"atol": 5e-5, "rtol": 0}
WITH_LATENTS = ["v2", "v3"]


def inputs(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of the model, and [B, T], True at the tokens whose logits matter."""
    ids = random_ids(2, 12)
    real = torch.ones_like(ids, dtype=torch.bool)
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.tensor([[*range(7), *range(5)]])}, real
    if kind == "full":
        return {"input_ids": ids}, real
    ids, mask = padded([random_ids(12), random_ids(7, seed=2)], side=kind)
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sdpa_equals_eager(family, kind):
    given, real = inputs(kind)
    expected = small_model(family, "eager", num_nextn_predict_layers=1)(**given, output_mtp_logits=True)
    output = small_model(family, "sdpa", num_nextn_predict_layers=1)(**given, output_mtp_logits=True)
    torch.testing.assert_close(output.logits[real], expected.logits[real], **TOLERANCE)
    real = real[:, :-1] & real[:, 1:]
    torch.testing.assert_close(output.mtp_logits[0][real], expected.mtp_logits[0][real], **TOLERANCE)


@torch.no_grad()
def test_flex_attention_equals_eager():
    """One case alone: on a CPU flex attention is compiled for each, which takes up to half a minute."""
    given, real = inputs("left")
    expected = small_model("v3", "eager", num_hidden_layers=1)(**given).logits
    logits = small_model("v3", "flex_attention", num_hidden_layers=1)(**given).logits
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", [[1] * 12, [8, 1, 1, 1, 1], [3, 5, 4], [1, 11]])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_tokens_attend_as_uncached_ones(family, chunks, implementation):
    model = small_model(family, implementation)
    ids, mask = padded([random_ids(12), random_ids(7, seed=2)], side="left")
    expected = small_model(family, "eager")(ids, attention_mask=mask).logits
    cache, logits, seen = None, [], 0
    for chunk in ids.split(chunks, dim=1):
        seen += chunk.shape[1]
        output = model(chunk, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("family", WITH_LATENTS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("masked", [None, "additive", "boolean"])
@torch.no_grad()
def test_absorbed_equals_expanded(family, queries, keys, masked):
    attention = small_model(family, "eager").model.layers[0].self_attn
    B, H, C = 2, attention.num_heads, attention.kv_lora_rank
    torch.manual_seed(0)
    q_nope = torch.randn(B, H, queries, attention.qk_nope_head_dim)
    q_rope = torch.randn(B, H, queries, attention.qk_rope_head_dim)
    latent, k_rope = torch.randn(B, 1, keys, C), torch.randn(B, 1, keys, attention.qk_rope_head_dim)
    # Without a mask several queries are the first ones, as a prompt is in a static cache with room for more; this is
    # what transformers' SDPA takes no mask to mean.
    seen = 0 if masked is None and queries > 1 else keys - queries
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(seen).expand(B, 1, queries, keys).clone()
    if masked is not None and keys > 1:
        allowed[1, ..., 0] = False  # the second row is left-padded by one
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected, expected_weights = attention.attend_expanded(q_nope, q_rope, latent, k_rope, additive)
    mask = {None: None, "additive": additive, "boolean": allowed}[masked]
    output, weights = attention.attend_absorbed(q_nope, q_rope, latent, k_rope, mask, attention.kv_b_proj.weight)
    assert output.shape == (B, queries, H, attention.v_head_dim)
    # A padding token's own row may attend to nothing; its output is of no use.
    rows = allowed.any(dim=-1).expand(B, H, queries)
    torch.testing.assert_close(output.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], **TOLERANCE)
    torch.testing.assert_close(weights[rows], expected_weights[rows], **TOLERANCE)


@pytest.mark.parametrize("family", WITH_LATENTS)
@torch.no_grad()
def test_absorbed_equals_expanded_in_bfloat16(family):
    """Tolerance: bfloat16 rounds to 2^-9 of a value, in each of the two forms some five times on the way."""
    attention = small_model(family, "sdpa").bfloat16().model.layers[0].self_attn
    torch.manual_seed(0)
    widths = (attention.qk_nope_head_dim, attention.qk_rope_head_dim)
    queries = [torch.randn(2, attention.num_heads, 3, width).bfloat16() for width in widths]
    widths = (attention.kv_lora_rank, attention.qk_rope_head_dim)
    cached = [torch.randn(2, 1, 40, width).bfloat16() for width in widths]
    mask = torch.ones(2, 1, 3, 40, dtype=torch.bool).tril(37)
    mask[1, ..., :5] = False
    absorbed, _ = attention.attend_absorbed(*queries, *cached, mask, attention.kv_b_proj.weight)
    expanded, _ = attention.attend_expanded(*queries, *cached, mask)
    assert absorbed.dtype == expanded.dtype == torch.bfloat16
    scale = expanded.float().abs().max().item()
    torch.testing.assert_close(absorbed, expanded, atol=10 * 2**-9 * scale, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", [[12], [8, 1, 1, 2], [3, 9]])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prepared_masks(family, chunks, implementation):
    """A 4-D mask, here of two documents in a row and a padded row, on a cache and without one."""
    model = small_model(family, implementation)
    ids = random_ids(2, 12)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[0, :, 5:, :5] = False
    mask[1, :, :, :3] = False
    positions = torch.stack([torch.tensor([*range(5), *range(7)]), torch.arange(-3, 9).clamp(min=0)])
    expected = [
        model(ids[:1, :5]).logits[0],
        model(ids[:1, 5:]).logits[0],
        model(ids[1:, 3:]).logits[0],
    ]
    cache, logits, seen = None, [], 0
    for chunk in ids.split(chunks, dim=1):
        past, seen = seen, seen + chunk.shape[1]
        part = mask[:, :, past:seen, :seen]
        additive = torch.zeros(part.shape).masked_fill(~part, torch.finfo(torch.float32).min)
        output = model(
            chunk,
            # Eager attention adds its mask to the scores.
            attention_mask=part if implementation == "sdpa" else additive,
            position_ids=positions[:, past:seen],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    for found, alone in zip([logits[0, :5], logits[0, 5:], logits[1, 3:]], expected, strict=True):
        torch.testing.assert_close(found, alone, **TOLERANCE)


def test_absorbing_is_chosen_by_the_number_of_multiplications():
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(DeepseekV3Config(), layer_idx=0)
    assert attention.absorbing_is_cheaper(num_queries=1, num_keys=4096)
    assert attention.absorbing_is_cheaper(num_queries=1, num_keys=2)
    assert not attention.absorbing_is_cheaper(num_queries=4096, num_keys=4096)
    # V3, a head: expanded S·512·256 + T·S·320, absorbed T·512·256 + T·S·1088; equal at T ≈ 145 for S = 1000.
    assert attention.absorbing_is_cheaper(num_queries=140, num_keys=1000)
    assert not attention.absorbing_is_cheaper(num_queries=150, num_keys=1000)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", WITH_LATENTS)
@torch.no_grad()
def test_an_adapter_on_kv_b_proj_takes_effect_in_cached_decoding(family, implementation, monkeypatch):
    """Absorbed attention reads the weight itself; it must not pass over what PEFT puts around it."""
    absorbed, attend_absorbed = [], MultiHeadLatentAttention.attend_absorbed
    monkeypatch.setattr(
        MultiHeadLatentAttention,
        "attend_absorbed",
        lambda self, *args: absorbed.append(self.layer_idx) or attend_absorbed(self, *args),
    )
    model = small_model(family, implementation)
    ids = random_ids(2, 12)
    plain = model(ids).logits
    lora = LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(model, lora)
    expected = adapted(ids).logits
    assert (expected - plain).abs().max() > 0.1

    def decoded(model):
        cache = model(ids[:, :8], use_cache=True).past_key_values
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(8, 12)]
        return torch.cat(steps, dim=1)

    absorbed.clear()
    torch.testing.assert_close(decoded(adapted), expected[:, 8:], **TOLERANCE)
    assert absorbed == [0, 1, 2] * 4
    with adapted.disable_adapter():
        torch.testing.assert_close(decoded(adapted), plain[:, 8:], **TOLERANCE)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(decoded(merged), expected[:, 8:], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_weights(family):
    model = small_model(family, "eager")
    ids = random_ids(2, 12)
    whole = model(ids, output_attentions=True, use_cache=False).attentions
    assert [weights.shape for weights in whole] == [(2, 4, 12, 12)] * 3
    for weights in whole:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        assert (weights.triu(1) == 0).all()
    cache = model(ids[:, :11], use_cache=True).past_key_values
    last = model(ids[:, 11:], past_key_values=cache, use_cache=True, output_attentions=True).attentions
    for weights, expected in zip(last, whole, strict=True):
        assert weights.shape == (2, 4, 1, 12)
        torch.testing.assert_close(weights, expected[:, :, -1:], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_grouped_queries_equal_repeated_heads(implementation):
    grouped = small_model("v1", implementation, num_key_value_heads=2)
    repeated = small_model("v1", implementation)
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):  # heads 0 and 1 use the first, 2 and 3 the second
            weights[name] = tensor.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    repeated.load_state_dict(weights)
    ids = random_ids(2, 12)
    torch.testing.assert_close(grouped(ids).logits, repeated(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_dropout_is_for_training(family, implementation):
    model = small_model(family, implementation, attention_dropout=0.5)
    ids = random_ids(2, 12)
    expected = small_model(family, implementation)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    model.train()
    assert (model(ids).logits - expected).abs().max() > 0.1
    # Tokens decoded one by one (a policy model's rollout in training mode) are dropped alike.
    cache = model(ids[:, :1], use_cache=True).past_key_values
    step = [model(ids[:, 1:2], past_key_values=cache, use_cache=True).logits for _ in range(2)]
    assert (step[0] - step[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_sdpa_equal_those_through_eager(family):
    gradients = []
    ids, mask = padded([random_ids(12), random_ids(7, seed=2)], side="left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 5] = -100  # its prediction would come from padding, whose attention is nowhere defined
    for implementation in ("eager", "sdpa"):
        model = small_model(family, implementation).train()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


def test_the_cache_holds_latents_only():
    config = small_config("v3")
    cache = small_model("v3")(random_ids(2, 12), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 12, config.kv_lora_rank)
        assert layer.values.shape == (2, 1, 12, config.qk_rope_head_dim)
