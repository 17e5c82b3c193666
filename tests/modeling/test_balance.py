"""Balance losses, expert loads, the bias update and token dropping, against the papers' formulas written out in loops.

Tolerance: losses are float32 means over at most 100 tokens of values of about 1, times an α of at most 1: 1e-5.
"""

import math

import pytest
import torch
from small_models import FAMILIES, PAD, mixtures, padded, random_ids, small_config, small_model

from deepseek_hf.modeling.balance import Routing, balance_loss, drop_tokens_over_capacity
from deepseek_hf.modeling.router import Router

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
ALPHAS = {"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.5, "comm_aux_loss_alpha": 0.7}


def affinities(config, logits: torch.Tensor) -> list[float]:
    """One token's affinities, normalised over the experts (softmax is so already; DeepSeek-V3 eq. 20)."""
    scores = logits.double().sigmoid() if config.scoring_func == "sigmoid" else logits.double().softmax(dim=-1)
    return (scores / scores.sum()).tolist()


def paper_losses(config, logits: torch.Tensor, index: torch.Tensor, devices: int, max_devices: int) -> list[float]:
    """Expert-level, device-level and communication loss of one sequence, DeepSeek-V2 eq. 23-31 without the α.

    `logits` [T, E], `index` [T, K]; T tokens, of which none is padding.
    """
    tokens, experts = logits.shape
    top_k, size = index.shape[1], experts // devices
    s = [affinities(config, row) for row in logits]
    # DeepSeek-V3 eq. 18 takes the experts with the highest affinities; DeepSeek-V2 eq. 24 those that are selected.
    counted = index.tolist()
    if config.topk_method == "noaux_tc":
        counted = [sorted(range(experts), key=lambda i, row=row: -row[i])[:top_k] for row in s]
    f = [experts / (top_k * tokens) * sum(i in chosen for chosen in counted) for i in range(experts)]
    p = [sum(row[i] for row in s) / tokens for i in range(experts)]
    on_device = [range(d * size, (d + 1) * size) for d in range(devices)]
    p_device = [sum(p[i] for i in on) for on in on_device]
    f_device = [sum(f[i] for i in on) / size for on in on_device]
    f_sent = [
        devices / (max_devices * tokens) * sum(any(i in on for i in chosen) for chosen in index.tolist())
        for on in on_device
    ]
    pairs = ((f, p), (f_device, p_device), (f_sent, p_device))
    return [sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs]


def route(config, *shape: int):
    """Random tokens through a router with random weights (and bias) → `(router_logits, topk_index)`."""
    torch.manual_seed(0)
    router = Router(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    if config.topk_method == "noaux_tc":
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.3)
    logits, _, index = router(torch.randn(*shape, config.hidden_size))
    return logits, index


@pytest.mark.parametrize(
    ("family", "fields", "devices", "max_devices"),
    [
        ("v1", {}, 1, 1),
        ("v1", {"n_expert_devices": 8}, 8, 3),  # three experts a token lie on three devices at most
        ("v2", {}, 4, 2),  # a device holds a group, so M is `topk_group`
        ("v2", {"n_expert_devices": 2}, 2, 2),
        ("v2", {"n_expert_devices": 8}, 8, 3),
        ("v2", {"n_group": 1, "topk_group": 1, "n_expert_devices": 4}, 4, 3),
        ("v3", {}, 4, 2),
        ("v3", {"scoring_func": "softmax", "n_expert_devices": 2}, 2, 2),
    ],
)
@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("alpha", [*ALPHAS, "all"])
def test_losses_are_those_of_the_papers(family, fields, devices, max_devices, seq_aux, alpha):
    alphas = {name: value if alpha in (name, "all") else 0.0 for name, value in ALPHAS.items()}
    config = small_config(family, seq_aux=seq_aux, **alphas, **fields)
    logits, index = route(config, 3, 10)
    # Row 0 is left-padded by 4, row 1 right-padded by 3, row 2 all real.
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, :4] = mask[1, 7:] = False
    rows = [(logits[10 * b : 10 * (b + 1)][mask[b]], index[10 * b : 10 * (b + 1)][mask[b]]) for b in range(3)]
    if not seq_aux:
        rows = [(torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows]))]
    expected = [paper_losses(config, *row, devices, max_devices) for row in rows]
    expected = sum(sum(a * loss for a, loss in zip(alphas.values(), row, strict=True)) for row in expected) / len(rows)

    loss = balance_loss(config, Routing(logits, index, mask), batch_size=3)
    torch.testing.assert_close(loss.item(), expected, **TOLERANCE)


def test_weighted_sequences_add_up():
    config = small_config("v2", **ALPHAS)
    logits, index = route(config, 3, 10)
    weight = torch.tensor([0.5, 0.2, 0.1])
    each = [
        balance_loss(config, Routing(logits[rows], index[rows], None), batch_size=1)
        for rows in (slice(0, 10), slice(10, 20), slice(20, 30))
    ]
    loss = balance_loss(config, Routing(logits, index, None), batch_size=3, sequence_weight=weight)
    torch.testing.assert_close(loss, (weight * torch.stack(each)).sum(), **TOLERANCE)


def test_gradient_flows_through_the_affinities_of_crowded_experts():
    config = small_config("v1", aux_loss_alpha=1.0)
    logits = torch.zeros(4, 8, requires_grad=True)
    index = torch.tensor([[0, 1, 2]]).expand(4, 3)
    balance_loss(config, Routing(logits, index, None), batch_size=1).backward()
    assert (logits.grad[:, :3] > 0).all()  # a descent step lowers the logits of the chosen
    assert (logits.grad[:, 3:] < 0).all()


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4), (3, 2)], ids=["left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_counts_nowhere(family, before, after, seq_aux):
    """Two rows give the same losses and loads with columns of padding as without."""
    model = small_model(family, seq_aux=seq_aux, num_nextn_predict_layers=2, **ALPHAS).train()
    ids = random_ids(2, 9)
    # transformers' loss has the last padding token on the left predict the first real one; it is not asked to.
    labels = torch.cat([torch.full((2, 1), -100), ids[:, 1:]], dim=1)
    expected = model(ids, labels=labels)
    expected_loads = model.collect_expert_load()

    def pad(value):
        return lambda tensor: torch.nn.functional.pad(tensor, (before, after), value=value)

    output = model(pad(PAD)(ids), attention_mask=pad(0)(torch.ones_like(ids)), labels=pad(-100)(labels))
    for name in ("loss", "aux_loss", "mtp_loss"):
        torch.testing.assert_close(output[name], expected[name], **TOLERANCE)
    assert as_lists(model.collect_expert_load()) == as_lists(expected_loads)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_counts_as_its_rows_do(family, side):
    model = small_model(family, num_nextn_predict_layers=2, **ALPHAS).train()
    rows = [random_ids(length, seed=length) for length in (9, 5, 7)]
    alone = [model(row[None], labels=row[None]).aux_loss for row in rows]
    expected_loads = model.collect_expert_load()
    ids, mask = padded(rows, side)
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(output.aux_loss, torch.stack(alone).mean(), **TOLERANCE)
    assert as_lists(model.collect_expert_load()) == as_lists(expected_loads)


def as_lists(loads: dict[int, torch.Tensor]) -> dict[int, list[int]]:
    return {layer: load.tolist() for layer, load in loads.items()}


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_add_up_over_forwards_and_count_each_token_once(family, checkpointing):
    model = small_model(family, num_nextn_predict_layers=1).train()
    chosen = {}  # layer → experts of the tokens of all forwards
    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.register_forward_hook(
                lambda _, __, output, layer=layer: chosen.setdefault(layer, []).append(output[2].flatten())
            )
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    batches = [random_ids(2, 9), random_ids(1, 6), random_ids(3, 4)]
    routed = []
    for ids in batches:
        chosen.clear()
        loss = model(ids, labels=ids).loss
        routed.append({layer: torch.cat(index).bincount(minlength=8) for layer, index in chosen.items()})
        loss.backward()  # with checkpointing it runs the layers a second time
    loads = model.collect_expert_load()
    assert as_lists(loads) == as_lists({layer: sum(each[layer] for each in routed) for layer in routed[0]})
    # The MTP layer sees one token less a row.
    assert {layer: load.sum().item() for layer, load in loads.items()} == {1: 36 * 3, 2: 36 * 3, 3: 30 * 3}
    assert model.collect_expert_load() == {}


def test_evaluation_counts_no_load():
    model = small_model("v3")
    ids = random_ids(2, 9)
    model(ids, labels=ids)
    assert model.collect_expert_load() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_router_bias_moves_towards_the_mean_load_and_starts_anew(dtype):
    model = small_model("v3", num_nextn_predict_layers=1).to(dtype).train()
    gates = {layer: block.mlp.gate for layer, block in enumerate(model.model.layers) if hasattr(block.mlp, "gate")}
    for gate in gates.values():
        gate.e_score_correction_bias.fill_(1.0)  # where a step of 0.001 is less than bfloat16 resolves
    for seed in range(3):
        ids = random_ids(2, 9, seed=seed)
        model(ids, labels=ids)
    loads = model.update_router_bias(speed=0.001)
    assert loads.keys() == gates.keys() == {1, 2, 3}
    for layer, load in loads.items():
        mean = load.sum().item() / 8
        expected = [1 + 0.001 * ((mean > each) - (mean < each)) for each in load.tolist()]
        bias = gates[layer].e_score_correction_bias
        torch.testing.assert_close(bias, torch.tensor(expected), atol=1e-7, rtol=0)  # half a float32 step at 1
        assert not bias.requires_grad

    before = {layer: gate.e_score_correction_bias.clone() for layer, gate in gates.items()}
    assert model.update_router_bias(speed=0.001) == {}
    assert all(torch.equal(gate.e_score_correction_bias, before[layer]) for layer, gate in gates.items())


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_routing_without_bias_refuses_the_update(family):
    model = small_model(family).train()
    with pytest.raises(ValueError, match=r"topk_method.*'noaux_tc'"):
        model.update_router_bias(speed=0.001)


@pytest.mark.parametrize("groups", [{}, {"n_group": 1, "topk_group": 1}])
@torch.no_grad()
def test_repeated_updates_balance_a_crooked_router(groups):
    model = small_model("v3", **groups).train()
    for mixture in mixtures(model):
        mixture.gate.weight[:2] *= 4  # scores of the first two are far from one half: often chosen, or never

    def busiest(loads):  # MaxVio of arXiv 2408.15664, 0 at perfect balance
        return max((load.max() / load.float().mean() - 1).item() for load in loads.values())

    ids = random_ids(8, 32)
    model(ids)
    before = busiest(model.collect_expert_load())
    for _ in range(60):
        model(ids)
        loads = model.update_router_bias(speed=0.01)
    assert before > 0.5
    assert busiest(loads) < 0.2


def test_capacity_keeps_the_heaviest_choices_of_each_device():
    config = small_config("v2", n_expert_devices=4, expert_capacity_factor=0.7)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(20)])
    weight = torch.rand(20, 3, generator=generator, requires_grad=True)
    mask = torch.arange(20) >= 5  # the first five are padding
    kept = drop_tokens_over_capacity(config, weight, index, mask)

    capacity = math.ceil(0.7 * 15 * 3 / 4)
    dropped = 0
    for device in range(4):
        queue = [(weight[t, k].item(), t, k) for t in range(5, 20) for k in range(3) if index[t, k] // 2 == device]
        for place, (w, t, k) in enumerate(sorted(queue, reverse=True)):
            assert kept[t, k].item() == (w if place < capacity else 0.0)
            dropped += place >= capacity
    assert dropped > 0
    kept.sum().backward()
    assert torch.equal(weight.grad[mask], (kept > 0)[mask].float())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_capacity_drops_in_training_only_and_nothing_when_large(family):
    ids = random_ids(2, 16)
    unlimited = small_model(family)
    limited, ample = (small_model(family, n_expert_devices=4, expert_capacity_factor=factor) for factor in (0.5, 4.0))
    expected = unlimited(ids).logits
    assert torch.equal(limited(ids).logits, expected)
    assert torch.equal(ample.train()(ids).logits, expected)
    assert not torch.allclose(limited.train()(ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_takes_no_capacity(family):
    model = small_model(family, n_expert_devices=4, expert_capacity_factor=0.8).train()
    ids = random_ids(2, 16)
    expected = model(ids).logits
    ids, mask = torch.nn.functional.pad(ids, (0, 16)), torch.nn.functional.pad(torch.ones_like(ids), (0, 16))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, :16], expected, **TOLERANCE)
