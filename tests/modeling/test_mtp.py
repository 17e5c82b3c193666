"""Multi-token prediction: alignment, targets, document boundaries, and what it adds to the loss.

Tolerance: float32 logits and losses of magnitude up to 20, computed by the same operations in another order or on rows
of other lengths: 5e-5.
"""

import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, PAD, padded, random_ids, small_model

from deepseek_hf.modeling.mtp import mtp_labels

TOLERANCE = {"atol": 5e-5, "rtol": 0}
DEPTHS = [1, 2, 3]


def packed(documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One packed row: `input_ids`, `position_ids` and `labels`, each [1, T]. No document predicts the next one's first
    token."""
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
        "labels": torch.cat([F.pad(document[1:], (1, 0), value=-100) for document in documents])[None],
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", DEPTHS)
@torch.no_grad()
def test_layers_chain_as_in_the_paper(family, depth):
    """DeepSeek-V3 eq. 21-23: token i+k+1's embedding joins the representation of the depth before at position i."""
    model = small_model(family, num_nextn_predict_layers=depth)
    ids = random_ids(2, 12)
    output = model(ids, output_mtp_logits=True, output_hidden_states=True)
    assert [logits.shape for logits in output.mtp_logits] == [(2, 11 - k, model.vocab_size) for k in range(depth)]

    hidden = output.hidden_states[-1]
    for k, layer in enumerate(model.mtp_layers):
        length = 11 - k
        embeddings = model.model.embed_tokens(ids[:, k + 1 :])
        hidden = layer.eh_proj(torch.cat([layer.enorm(embeddings), layer.hnorm(hidden[:, :length])], dim=-1))
        positions = model.model.rotary_emb(hidden, torch.arange(length)[None])
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), positions, mask)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))[0]
        hidden = layer.shared_head.norm(hidden)
        torch.testing.assert_close(output.mtp_logits[k], model.lm_head(hidden), **TOLERANCE)


def test_layers_follow_the_main_model_and_share_its_embedding_and_head():
    for tied in (False, True):
        model = small_model("v3", num_nextn_predict_layers=2, tie_word_embeddings=tied)
        assert len(model.model.layers) == 5
        assert list(model.mtp_layers) == list(model.model.layers)[3:]
        tables = {name for name, tensor in model.named_parameters() if model.vocab_size in tensor.shape}
        assert tables == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        ids = random_ids(1, 8)
        model.train()(ids, labels=ids).mtp_loss.backward()  # through the shared tables
        assert model.lm_head.weight.grad.abs().sum() > 0
        assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def labels_by_token(labels, depth, mask, position_ids):
    """`mtp_labels` token by token."""
    rows = []
    for b, row in enumerate(labels.tolist()):
        targets = []
        for i in range(len(row) - 1 - depth):
            span = range(i, i + depth + 3)
            learnable = span[-1] < len(row)
            if learnable and mask is not None:
                learnable = all(mask[b, j] for j in span)
            if learnable and position_ids is not None:
                position = position_ids[b if len(position_ids) > 1 else 0].tolist()
                learnable = all(position[j + 1] == position[j] + 1 for j in span[:-1])
            targets.append(row[span[-1]] if learnable else -100)
        rows.append(targets)
    return torch.tensor(rows)


def cases_of_labels():
    """name → (labels, token_mask, position_ids), rows of 12 tokens."""
    labels = random_ids(2, 12)
    labels_of_a_prompt = labels.clone()
    labels_of_a_prompt[0, :5] = -100
    mask = torch.ones(2, 12, dtype=torch.bool)
    left, right, hole = mask.clone(), mask.clone(), mask.clone()
    left[0, :4] = right[0, 9:] = hole[1, 5:7] = False
    documents = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    from_the_mask = (left.long().cumsum(-1) - 1).clamp(min=0)
    return {
        "plain": (labels, None, None),
        "prompt": (labels_of_a_prompt, None, None),
        "left": (labels, left, None),
        "left, positions from the mask": (labels, left, from_the_mask),
        "right": (labels, right, None),
        "hole": (labels, hole, None),
        "packed": (labels, None, documents),
        "packed alike": (labels, None, documents[:1]),
        "packed, then padded": (labels, right, documents),
    }


@pytest.mark.parametrize("name", cases_of_labels())
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_targets_token_by_token(name, depth):
    case = cases_of_labels()[name]
    for length in (12, depth + 2):  # the shorter is the least that the depth takes
        labels, mask, position_ids = (None if each is None else each[:, :length] for each in case)
        expected = labels_by_token(labels, depth, mask, position_ids)
        assert mtp_labels(labels, depth, mask, position_ids).tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_a_packed_row_is_its_documents_one_by_one(family, attn_implementation):
    # Documents of one token and of two are too short for the second depth, or for any.
    documents = [random_ids(length, seed=length) for length in (7, 4, 1, 2, 6)]
    model = small_model(family, attn_implementation, num_nextn_predict_layers=2)
    model.train()
    together = model(**packed(documents), output_mtp_logits=True)
    loads = model.collect_expert_load()

    sums, targets = torch.zeros(3), torch.zeros(3)  # of the main model and of the two depths
    start = 0
    for document in documents:
        end = start + len(document)
        alone = model(document[None], output_mtp_logits=len(document) > 2)
        torch.testing.assert_close(together.logits[:, start:end], alone.logits, **TOLERANCE)
        sums[0] += F.cross_entropy(alone.logits[0, :-1], document[1:], reduction="sum")
        targets[0] += len(document) - 1
        for k, logits in enumerate(alone.mtp_logits or ()):
            torch.testing.assert_close(together.mtp_logits[k][:, start : end - 1 - k], logits, **TOLERANCE)
            sums[k + 1] += F.cross_entropy(logits[0, :-1], document[k + 2 :], reduction="sum")
            targets[k + 1] += len(document) - 2 - k
        start = end
    losses = sums / targets
    torch.testing.assert_close(together.mtp_loss, losses[1:].mean(), **TOLERANCE)
    expected = losses[0] + 0.3 * losses[1:].mean() + together.aux_loss
    torch.testing.assert_close(together.loss, expected, **TOLERANCE)
    # A position whose next tokens are another document's is no token of the MTP layers.
    assert [load.sum().item() for load in loads.values()] == [20 * 3, 20 * 3, 15 * 3, 11 * 3]


def test_packed_and_padded_batches_weigh_the_experts_alike():
    """Balance loss over the batch: whether the documents stand in one row or in one each does not matter."""
    model = small_model("v2", num_nextn_predict_layers=2, seq_aux=False, aux_loss_alpha=1.0).train()
    documents = [random_ids(length, seed=length) for length in (7, 4, 6)]
    in_one_row = model(**packed(documents))
    loads = model.collect_expert_load()
    ids, mask = padded(documents, "right")
    in_rows = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    for name in ("loss", "mtp_loss", "aux_loss"):
        torch.testing.assert_close(in_one_row[name], in_rows[name], **TOLERANCE)
    for layer, load in model.collect_expert_load().items():
        assert load.tolist() == loads[layer].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_in_training_and_in_evaluation(family):
    model = small_model(family, num_nextn_predict_layers=2, mtp_loss_weight=0.7, aux_loss_alpha=0.5)
    ids = random_ids(2, 10)
    evaluated = model.eval()(ids, labels=ids, output_mtp_logits=True)
    cross_entropy = F.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    mtp_losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, k + 2 :].flatten())
        for k, logits in enumerate(evaluated.mtp_logits)
    ]
    torch.testing.assert_close(evaluated.loss, cross_entropy, **TOLERANCE)
    torch.testing.assert_close(evaluated.mtp_loss, sum(mtp_losses) / 2, **TOLERANCE)
    assert evaluated.aux_loss > 0.5  # four layers, each at least about α

    trained = model.train()(ids, labels=ids)
    assert trained.mtp_logits is None
    torch.testing.assert_close(trained.mtp_loss, evaluated.mtp_loss, **TOLERANCE)
    torch.testing.assert_close(trained.aux_loss, evaluated.aux_loss, **TOLERANCE)
    expected = cross_entropy + 0.7 * evaluated.mtp_loss + evaluated.aux_loss
    torch.testing.assert_close(trained.loss, expected, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_parameter_of_every_depth_is_trained(family, depth):
    model = small_model(family, num_nextn_predict_layers=depth).train()
    ids = random_ids(4, 16)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_without_weight_nothing_is_computed_in_training():
    model = small_model("v3", num_nextn_predict_layers=1, mtp_loss_weight=0.0)
    ids = random_ids(2, 10)
    runs = []
    model.mtp_layers[0].register_forward_hook(lambda *_: runs.append(True))
    output = model.train()(ids, labels=ids)
    assert output.mtp_loss is None
    assert not runs
    output.loss.backward()
    assert all(parameter.grad is None for parameter in model.mtp_layers.parameters())
    assert model.eval()(ids, labels=ids).mtp_loss is not None


def test_without_labels_the_layers_run_on_request_only():
    model = small_model("v3", num_nextn_predict_layers=1)
    runs = []
    model.mtp_layers[0].register_forward_hook(lambda *_: runs.append(True))
    ids = random_ids(2, 10)
    output = model(ids)
    assert output.mtp_loss is None
    assert output.mtp_logits is None
    assert not runs
    assert model(ids, output_mtp_logits=True).mtp_loss is None
    assert runs == [True]


def test_a_row_too_short_for_the_depth_is_refused():
    model = small_model("v3", num_nextn_predict_layers=2)
    shortest = random_ids(1, 3)
    assert model.train()(shortest, labels=shortest).loss.isfinite()
    with pytest.raises(ValueError, match=r"`input_ids` has 2 tokens a row; accepted: at least 3"):
        model(shortest[:, :2], labels=shortest[:, :2])


def test_a_cache_with_earlier_tokens_is_refused():
    model = small_model("v3", num_nextn_predict_layers=1)
    ids = random_ids(1, 10)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds earlier tokens"):
        model(ids[:, 6:], past_key_values=cache, output_mtp_logits=True)


@torch.no_grad()
def test_embedded_input_a_prepared_mask_and_padding_on_the_left_change_nothing():
    model = small_model("v3", num_nextn_predict_layers=2)
    ids = random_ids(1, 9)
    expected = model(ids, output_mtp_logits=True)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids), output_mtp_logits=True)
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    masked = model(ids, attention_mask=causal, output_mtp_logits=True)
    left = F.pad(ids, (4, 0), value=PAD)
    padded_before = model(left, attention_mask=(left != PAD).long(), output_mtp_logits=True)
    for k, logits in enumerate(expected.mtp_logits):
        torch.testing.assert_close(embedded.mtp_logits[k], logits, **TOLERANCE)
        torch.testing.assert_close(masked.mtp_logits[k], logits, **TOLERANCE)
        torch.testing.assert_close(padded_before.mtp_logits[k][:, 4:], logits, **TOLERANCE)
