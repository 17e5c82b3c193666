"""What transformers, accelerate and torch may do with any model, they may do with these.

Tolerance: float32 logits and gradients of magnitude up to 10, computed in another order: 5e-5.
"""

import copy
import io
import pickle

import pytest
import torch
from small_models import FAMILIES, PAD, VOCABULARY, mixtures, padded, random_ids, small_config, small_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, StaticCache

TOLERANCE = {"atol": 5e-5, "rtol": 0}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one forward pass in training mode, and the gradients by parameter name."""
    loss = model.train()(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    sizes = {"num_nextn_predict_layers": 2, "aux_loss_alpha": 0.5, "n_expert_devices": 4, "expert_capacity_factor": 0.8}
    ids = random_ids(2, 12)
    loss, expected = gradients(small_model(family, **sizes), input_ids=ids, labels=ids)
    model = small_model(family, **sizes)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed_loss, found = gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(checkpointed_loss, loss, **TOLERANCE)
    assert_same(found, expected)


@torch.no_grad()
def test_outputs_on_request(family):
    model = small_model(family, "eager", num_nextn_predict_layers=2)
    ids = random_ids(2, 12)
    requested = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    output = model(ids, **requested, output_mtp_logits=True)
    # Two of the three layers are mixtures; the MTP layers are no part of the main model's records.
    assert [logits.shape for logits in output.router_logits] == [(2 * 12, 8)] * 2
    assert [states.shape for states in output.hidden_states] == [(2, 12, 32)] * 4
    assert [weights.shape for weights in output.attentions] == [(2, 4, 12, 12)] * 3
    torch.testing.assert_close(output.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    model.config.output_router_logits = True
    assert len(model(ids).router_logits) == 2
    plain = small_model(family)(ids)
    assert plain.router_logits is plain.hidden_states is plain.attentions is plain.mtp_logits is None


@torch.no_grad()
def test_outputs_as_a_tuple_and_partial_logits(family):
    model = small_model(family)
    ids = random_ids(2, 12)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, return_dict=False)[0], expected)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected[:, -1:], **TOLERANCE)
    kept = torch.tensor([2, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected[:, kept], **TOLERANCE)


@torch.no_grad()
def test_embedded_input(family):
    model = small_model(family, num_nextn_predict_layers=1)
    ids = random_ids(2, 12)
    embeds = model.get_input_embeddings()(ids)
    expected, found = model(ids, labels=ids), model(inputs_embeds=embeds, labels=ids)
    for name in ("loss", "logits", "mtp_loss", "aux_loss"):
        torch.testing.assert_close(found[name], expected[name])
    for both_or_none in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**both_or_none)


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_vocabulary(family, tied):
    model = small_model(family, num_nextn_predict_layers=1, tie_word_embeddings=tied)
    ids = random_ids(2, 12)
    with torch.no_grad():
        before = model(ids, output_mtp_logits=True)
        model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
        after = model(ids, output_mtp_logits=True)
    assert model.config.vocab_size == after.logits.shape[-1] == after.mtp_logits[0].shape[-1] == VOCABULARY + 7
    torch.testing.assert_close(after.logits[..., :VOCABULARY], before.logits, **TOLERANCE)
    torch.testing.assert_close(after.mtp_logits[0][..., :VOCABULARY], before.mtp_logits[0], **TOLERANCE)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    new_tokens = torch.full((1, 8), VOCABULARY + 6)
    loss, found = gradients(model, input_ids=new_tokens, labels=new_tokens)
    assert loss.isfinite()
    assert found["model.embed_tokens.weight"][-1].abs().sum() > 0


@pytest.mark.parametrize("where", ["cpu", "disk"])
@torch.no_grad()
def test_layers_offloaded(family, where, tmp_path):
    """accelerate brings offloaded weights in when a module's `forward` runs; nothing may read them past it."""
    model = small_model(family, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "model")
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {"model.layers.0": "cpu", "model.layers.3": "cpu"}
    placed |= {"model.layers.1": where, "model.layers.2": where}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offloaded"
    )
    assert (next(loaded.model.layers[1].parameters()).device.type == "meta") == (where == "disk")
    ids = random_ids(2, 12)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **TOLERANCE)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    assert loaded.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()


@torch.no_grad()
def test_device_map_auto(family, tmp_path):
    model = small_model(family, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": size // 2},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in loaded.hf_device_map.values()
    ids = random_ids(2, 12)
    expected, found = (each(ids, output_mtp_logits=True) for each in (model, loaded))
    torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(found.mtp_logits[0], expected.mtp_logits[0], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(family, dtype, tmp_path):
    model = small_model(family, num_nextn_predict_layers=1)
    ids = random_ids(2, 12)
    expected = model(ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, copy.deepcopy(model).to(dtype)):
        output = half(ids, labels=ids)
        assert output.logits.dtype == dtype
        assert output.loss.isfinite()
        # bfloat16 keeps 8 bits: errors of 2^-8 of the magnitude in each of a few dozen operations. A token whose
        # experts are a near-tie may be routed otherwise, so the median tells.
        error = (output.logits.float() - expected.logits).abs().median()
        assert error < 0.05 * expected.logits.abs().max()
    for mixture in mixtures(loaded):
        if family == "v3":
            assert mixture.gate.e_score_correction_bias.dtype == torch.float32


@torch.no_grad()
def test_casting_there_and_back(family):
    """`bfloat16()` rounds the weights and nothing else: the rotation angles of far positions would collapse."""
    model = small_model(family, max_position_embeddings=8192)
    ids = random_ids(2, 12)
    generation = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    # One key at position 0 and the others far from it; the mask says that this is one document, not two packed.
    far = {"position_ids": torch.tensor([[0, *range(4001, 4012)]]), "attention_mask": torch.ones_like(ids)}
    model.bfloat16()
    assert model.dtype == model(ids).logits.dtype == torch.bfloat16
    assert model.generate(ids, **generation).shape == (2, 16)
    rounded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.float()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = small_model(family, max_position_embeddings=8192)
    expected.load_state_dict(rounded)
    torch.testing.assert_close(model(ids, **far).logits, expected(ids, **far).logits)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies(family, copied):
    model = small_model(family, num_nextn_predict_layers=1)
    ids = random_ids(2, 12)
    model.train()(ids, labels=ids)  # with loads counted
    model.eval()
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    loads = model.collect_expert_load()
    assert loads
    assert all(torch.equal(load, loads[layer]) for layer, load in twin.collect_expert_load().items())


@pytest.mark.parametrize("pad_token_id", [PAD, None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(family, side, pad_token_id):
    config = small_config(family, num_labels=3, num_nextn_predict_layers=1, pad_token_id=PAD)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert len(model.model.layers) == 3  # a classifier has no use for MTP layers
    rows = [random_ids(length, seed=length) for length in (9, 4)]
    alone = torch.cat([model(row[None]).logits for row in rows])
    ids, mask = padded(rows, side)
    output = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.logits, alone, **TOLERANCE)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(alone, torch.tensor([0, 2])), **TOLERANCE)
    model.config.pad_token_id = pad_token_id
    if pad_token_id is None:
        with pytest.raises(ValueError, match="padding token"):
            model(ids, attention_mask=mask)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_kinds_of_classification(family, problem):
    config = small_config(family, num_labels=1 if problem == "regression" else 3, problem_type=problem)
    model = AutoModelForSequenceClassification.from_config(config).train()
    ids = random_ids(2, 9)
    output = model(ids, labels=torch.rand(2, config.num_labels).squeeze(-1))
    output.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_compiled_forward():
    """Through inductor, once; `fullgraph` allows no part that falls back to Python."""
    model = small_model("v3", num_hidden_layers=2)
    ids = random_ids(2, 12)
    expected = model(ids).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_compiled_decoding():
    """One graph serves all steps: a static cache keeps the shapes."""
    model = small_model("v3", num_hidden_layers=2)
    ids = random_ids(2, 12)
    expected = model(ids).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :8], past_key_values=cache, use_cache=True)
    for t in range(8, 12):
        position = torch.tensor([[t]])
        logits = compiled(ids[:, t : t + 1], past_key_values=cache, use_cache=True, position_ids=position).logits
        torch.testing.assert_close(logits, expected[:, t : t + 1], **TOLERANCE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_training_step():
    """Traced and differentiated ahead of time; the kernels, which take long to compile, stay eager."""
    ids = random_ids(2, 12)
    sizes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.5}
    model = small_model("v3", **sizes)
    loss, expected = gradients(model, input_ids=ids, labels=ids)
    loads = model.collect_expert_load()
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, _ = gradients(compiled, input_ids=ids, labels=ids)
    torch.testing.assert_close(compiled_loss, loss, **TOLERANCE)
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    for layer, load in model.collect_expert_load().items():
        assert load.tolist() == loads[layer].tolist()
