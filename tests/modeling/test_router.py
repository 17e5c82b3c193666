"""Routing against a reading of the papers and of the published gates, written out token by token.

Tolerance: both sides compute in float32 (the reference from there on in float64), so they agree to float32 rounding of
values of about 1: 1e-6.
"""

import itertools
import math

import pytest
import torch
from small_models import FAMILIES, mixtures, random_ids, small_config, small_model

from deepseek_hf.modeling.experts import MixtureOfExperts
from deepseek_hf.modeling.router import Router

TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}

ROUTINGS = {
    "v1": ("v1", {}),
    "v1 normalised": ("v1", {"norm_topk_prob": True}),
    "v2 greedy": ("v2", {"topk_method": "greedy"}),
    "v2 greedy normalised": ("v2", {"topk_method": "greedy", "norm_topk_prob": True}),
    "v2": ("v2", {}),
    "v2 normalised": ("v2", {"norm_topk_prob": True}),
    "v2 one group of two": ("v2", {"n_group": 2, "topk_group": 1}),
    "v2 one expert": ("v2", {"num_experts_per_tok": 1, "norm_topk_prob": True}),
    "v3": ("v3", {}),
    "v3 not normalised": ("v3", {"norm_topk_prob": False}),
    "v3 one group": ("v3", {"n_group": 1, "topk_group": 1}),
    "v3 one expert": ("v3", {"num_experts_per_tok": 1}),
    "v3 softmax": ("v3", {"scoring_func": "softmax"}),
}


def make_router(config, bias: float = 0.5) -> Router:
    """A router with random weights and, where it has one, a random bias of that deviation."""
    generator = torch.Generator().manual_seed(0)
    router = Router(config)
    torch.nn.init.normal_(router.weight, std=0.3, generator=generator)
    if config.topk_method == "noaux_tc":
        torch.nn.init.normal_(router.e_score_correction_bias, std=bias, generator=generator)
    return router


def reference(config, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert → weight of one token."""
    experts, k = range(len(logits)), config.num_experts_per_tok
    if config.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]

    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    allowed = list(experts)
    if config.topk_method != "greedy":
        size = len(logits) // config.n_group
        groups = [list(experts)[size * g : size * (g + 1)] for g in range(config.n_group)]
        best = 2 if config.topk_method == "noaux_tc" else 1  # V3: sum of the two best; V2: the best
        groups.sort(key=lambda group: -sum(sorted((biased[i] for i in group), reverse=True)[:best]))
        allowed = [i for group in groups[: config.topk_group] for i in group]
    chosen = sorted(allowed, key=lambda i: -biased[i])[:k]

    weights = {i: scores[i] for i in chosen}
    normalised = config.norm_topk_prob and k > 1
    if normalised:
        total = sum(weights.values())
        weights = {i: weight / total for i, weight in weights.items()}
    if config.topk_method == "noaux_tc" or not normalised:  # V2 scales only what it does not normalise
        weights = {i: weight * config.routed_scaling_factor for i, weight in weights.items()}
    return weights


@pytest.mark.parametrize("name", ROUTINGS)
@torch.no_grad()
def test_every_token_goes_where_the_reference_sends_it(name):
    family, fields = ROUTINGS[name]
    router = make_router(small_config(family, **fields))
    hidden_states = torch.randn(2, 100, 32, generator=torch.Generator().manual_seed(1))
    logits, weight, index = router(hidden_states)
    assert (logits.shape, weight.shape, index.shape) == ((200, 8), (200, router.top_k), (200, router.top_k))

    bias = router.e_score_correction_bias.tolist() if hasattr(router, "e_score_correction_bias") else [0.0] * 8
    expected_logits = hidden_states.flatten(0, 1).double() @ router.weight.double().T
    # 32 float32 products of magnitude up to 1 are summed here: 1e-5.
    torch.testing.assert_close(logits.double(), expected_logits, atol=1e-5, rtol=0)
    for token in range(200):
        expected = reference(router.config, logits[token].tolist(), bias)
        assert set(index[token].tolist()) == expected.keys()
        expected_weight = torch.tensor([expected[i] for i in index[token].tolist()])
        torch.testing.assert_close(weight[token], expected_weight, **TOLERANCE)


@torch.no_grad()
def test_a_group_scores_by_its_best_expert_in_v2_and_by_its_two_best_in_v3():
    # The first group holds the single best expert, the second the best pair.
    logits = torch.tensor([2.0, -4.0, 1.0, 1.0])
    sizes = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1, "hidden_size": 4}
    for family, expected in (("v2", 0), ("v3", 2)):
        router = make_router(small_config(family, **sizes), bias=0.0)
        router.weight.copy_(torch.diag(logits + torch.tensor([0, 0, 0.1, 0])))
        index = router(torch.ones(1, 4))[2]
        assert index.tolist() == [[expected]]


@torch.no_grad()
def test_the_bias_chooses_and_leaves_the_weights_alone():
    router = make_router(small_config("v3", n_group=1, topk_group=1, norm_topk_prob=False), bias=0.0)
    hidden_states = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    scores = router(hidden_states)[0].sigmoid()
    router.e_score_correction_bias[5] = 10.0
    _, weight, index = router(hidden_states)
    assert (index == 5).any(dim=-1).all()
    torch.testing.assert_close(weight, scores.gather(1, index) * 2.5, **TOLERANCE)


@torch.no_grad()
def test_negative_biased_scores_keep_the_group_limit():
    # With masked experts at 0 instead of -inf, any of them would beat a biased score below 0.
    router = make_router(small_config("v3"), bias=0.0)
    hidden_states = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    expected = router(hidden_states)[2].sort().values
    router.e_score_correction_bias.fill_(-5.0)
    assert torch.equal(router(hidden_states)[2].sort().values, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_float32_in_a_bfloat16_model(family):
    router = make_router(small_config(family)).bfloat16()
    hidden_states = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits, weight, index = router(hidden_states)
    assert logits.dtype == weight.dtype == torch.float32
    expected_logits, expected_weight, expected_index = router.float()(hidden_states.float())
    assert torch.equal(logits, expected_logits)
    assert torch.equal(weight, expected_weight)
    assert torch.equal(index, expected_index)


@pytest.mark.parametrize("experts_implementation", ["eager", "grouped_mm", "batched_mm", "per_device"])
@pytest.mark.parametrize(("family", "n_shared_experts"), itertools.product(FAMILIES, [None, 0, 2]))
@torch.no_grad()
def test_a_mixture_is_the_weighted_sum_of_its_experts(family, n_shared_experts, experts_implementation):
    config = small_config(family, n_shared_experts=n_shared_experts)
    config._experts_implementation = experts_implementation
    torch.manual_seed(0)
    mixture = MixtureOfExperts(config)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden_states = torch.randn(2, 9, 32)
    output, _, _ = mixture(hidden_states)

    def swiglu(x, gate, up, down):
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    _, weight, index = mixture.gate(hidden_states)
    expected = []
    for x, weights, indices in zip(hidden_states.flatten(0, 1), weight, index, strict=True):
        y = torch.zeros(32)
        for w, i in zip(weights, indices.tolist(), strict=True):
            gate, up = mixture.experts.gate_up_proj[i].split(16)
            y += w * swiglu(x, gate, up, mixture.experts.down_proj[i])
        if n_shared_experts:
            shared = mixture.shared_experts
            assert shared.gate_proj.weight.shape == (n_shared_experts * 16, 32)
            y += swiglu(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        expected.append(y)
    assert hasattr(mixture, "shared_experts") == bool(n_shared_experts)
    # Sums of 32 and 16 float32 products, output up to 10: 1e-4 is several hundred roundings.
    torch.testing.assert_close(output.flatten(0, 1), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_moe_layer_freq(family):
    model = small_model(family, num_hidden_layers=7, first_k_dense_replace=2, moe_layer_freq=2)
    kinds = [isinstance(layer.mlp, MixtureOfExperts) for layer in model.model.layers]
    assert kinds == [False, False, True, False, True, False, True]
    ids = random_ids(2, 8)
    output = model(ids, labels=ids, output_router_logits=True)
    assert len(output.router_logits) == 3
    assert output.loss.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_routed_experts_the_model_is_dense(family):
    fields = {"n_routed_experts": None, "num_experts_per_tok": None, "num_nextn_predict_layers": 1}
    model = small_model(family, **fields).train()
    assert not mixtures(model)
    ids = random_ids(2, 8)
    output = model(ids, labels=ids)
    assert output.aux_loss is None
    assert model.collect_expert_load() == {}
    cross_entropy = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, cross_entropy + 0.3 * output.mtp_loss, **TOLERANCE)
