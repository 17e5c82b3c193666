import json

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from deepseek_hf.finetune.expert_scores import ExpertScores, collect_expert_scores
from deepseek_hf.modeling import DeepseekV3ForCausalLM

ROWS = [list(range(5, 5 + length)) for length in (9, 4, 17, 6)]


@pytest.fixture
def batches(tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return [collate(rows[:2]), collate(rows[2:])]


@torch.no_grad()
def test_scores_are_shares_of_tokens_and_of_gates(model, batches):
    """Counted here from the router's own outputs, a row at a time and so without padding."""
    scores = collect_expert_scores(model, batches, max_tokens=1000)
    assert scores.num_tokens == sum(map(len, ROWS))
    token, gate = torch.zeros(4), torch.zeros(4)
    routed = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda _, args, output: routed.append(output))
    for row in ROWS:
        model.eval()(torch.tensor([row]))
    hook.remove()
    for _, weight, index in routed:
        for expert in range(4):
            token[expert] += (index == expert).sum()
            gate[expert] += weight[index == expert].sum()
    assert scores.sums["token"].keys() == {1}  # neither the dense layer nor the MTP layer
    # Padding changes the shape of matrix products and with it float32's last digits.
    torch.testing.assert_close(scores.shares("token")[1].float(), token / token.sum())
    torch.testing.assert_close(scores.shares("gate")[1].float(), gate / gate.sum(), rtol=1e-4, atol=1e-6)


def test_sample_ends_at_max_tokens(model, batches):
    assert collect_expert_scores(model.train(), batches, max_tokens=10).num_tokens == len(ROWS[0]) + len(ROWS[1])
    assert model.training
    assert not model.model.layers[1].mlp.gate._forward_hooks


def test_parts_of_a_sample_add_up(model, batches):
    whole = collect_expert_scores(model, batches, 1000)
    merged = collect_expert_scores(model, batches[:1], 1000)
    merged.merge(collect_expert_scores(model, batches[1:], 1000))
    assert merged.num_tokens == whole.num_tokens
    for function in ("token", "gate"):
        torch.testing.assert_close(merged.sums[function], whole.sums[function])


@pytest.fixture
def scores() -> ExpertScores:
    scores = ExpertScores({1: 4, 3: 4})
    scores.sums["token"] = {1: torch.tensor([1.0, 5, 2, 2]).double(), 3: torch.tensor([10.0, 0, 0, 0]).double()}
    scores.sums["gate"] = {1: torch.tensor([0.0, 0, 0, 4]).double(), 3: torch.tensor([1.0, 1, 1, 1]).double()}
    return scores


@pytest.mark.parametrize(
    ("function", "top_p", "chosen"),
    [
        ("token", 0.5, {1: [1], 3: [0]}),
        ("token", 0.51, {1: [1, 2], 3: [0]}),
        ("token", 0.7, {1: [1, 2], 3: [0]}),  # 0.5 + 0.2 in floating point
        ("token", 1.0, {1: [1, 2, 3, 0], 3: [0]}),
        ("gate", 0.3, {1: [3], 3: [0, 1]}),
    ],
)
def test_fewest_experts_that_reach_p(scores, function, top_p, chosen):
    assert scores.choose(function, top_p) == chosen


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1])
def test_p_is_a_share(scores, top_p):
    with pytest.raises(ValueError, match=f"esft_top_p={top_p}; accepted: above 0, up to 1"):
        scores.choose("token", top_p)


def test_files(scores, tmp_path):
    scores.write(tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["token_scores"]["1"] == {"0": 0.1, "1": 0.5, "2": 0.2, "3": 0.2}
    assert written["gate_scores"]["3"]["2"] == 0.25
    scores.save_heat_map(tmp_path / "scores.png", "token", {1: [1], 3: [0]})
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_model_without_experts(config):
    dense = {"n_routed_experts": None, "n_shared_experts": None, "num_nextn_predict_layers": 0}
    model = DeepseekV3ForCausalLM(type(config).from_dict(config.to_dict() | dense))
    with pytest.raises(ValueError, match="no routed experts to score"):
        collect_expert_scores(model, [], 10)
