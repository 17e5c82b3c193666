"""The loss over some tokens at a time is the loss over all of them at once, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from small_models import VOCABULARY, random_ids, small_model

from deepseek_hf.modeling.token_loss import TOKENS_AT_A_TIME, chunked_cross_entropy

# float32 sums of some hundred terms of magnitude 1 to 10, in another order
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.mark.parametrize("tokens", [5, TOKENS_AT_A_TIME, 2 * TOKENS_AT_A_TIME + 3])
@pytest.mark.parametrize("num_items", [None, 4000])
def test_loss_and_gradients(tokens, num_items):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, VOCABULARY)
    targets = random_ids(2, tokens)
    targets[0, : tokens // 3] = -100

    def run(loss_of):
        hidden = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        head.zero_grad()
        loss = loss_of(hidden)
        (3 * loss).backward()
        return loss, hidden.grad, head.weight.grad.clone()

    def unchunked(hidden):
        losses = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        return losses / (num_items or (targets != -100).sum())

    expected = run(unchunked)
    found = run(lambda hidden: chunked_cross_entropy(hidden, head, targets, num_items))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_without_a_target_loss_and_gradients_are_zero():
    head, hidden = torch.nn.Linear(4, 9), torch.randn(1, 3, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, head, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == 0
    assert head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_trains_alike_without_its_logits(adapted):
    model = small_model("v3", num_nextn_predict_layers=2)
    if adapted:  # a head that is more than its weight
        torch.manual_seed(0)
        targets = ["kv_b_proj", "eh_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.train()
    ids = random_ids(5, 150)  # three chunks
    labels = ids.clone()
    labels[:, :40] = -100
    most = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: most.append(out.shape[:-1].numel()))

    def run(**kwargs):
        model.zero_grad()
        output = model(ids, labels=labels, **kwargs)
        output.loss.backward()
        return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = run()
    assert max(most) == 5 * 150
    most.clear()
    found, gradients = run(output_logits=False)
    assert max(most) <= TOKENS_AT_A_TIME
    hook.remove()
    assert found.logits is None
    assert expected.logits.shape == (5, 150, VOCABULARY)
    for name in ("loss", "mtp_loss", "aux_loss"):
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE)
    assert gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(gradients, expected_gradients, **TOLERANCE)


def test_losses_of_the_depths():
    model = small_model("v3", num_nextn_predict_layers=2)
    ids = random_ids(2, 10)
    output = model(ids, labels=ids, output_mtp_logits=True)
    for depth, (loss, logits) in enumerate(zip(output.mtp_losses, output.mtp_logits, strict=True)):
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, depth + 2 :].flatten())
        torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(output.mtp_loss, sum(output.mtp_losses) / 2)


def test_neither_loss_nor_logits_is_refused():
    with pytest.raises(ValueError, match="`output_logits` is False and there are no `labels`"):
        small_model("v3")(random_ids(1, 4), output_logits=False)
