"""The measurements of both heads against a straightforward count on a small random model."""

import pytest
import torch
from pretrain_tiny import pack
from test_pretrain_tiny import small_config
from tiny_held_out import measure

from deepseek_hf.modeling import DeepseekV3ForCausalLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = small_config()
    config.vocab_size, config.initializer_range = 4096, 0.2  # wide weights: choices that differ from place to place
    return DeepseekV3ForCausalLM(config).eval()


@torch.no_grad()
def test_measure_agrees_with_one_token_at_a_time(model, tokenizer):
    texts = ["import os\n\nx = os.getcwd()\n", "def f(y):\n    return y + 1\n"]
    length = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    measured = measure(model, pack(texts, tokenizer, length))

    # Documents one by one, unpacked: no boundary to mind.
    losses, hits, mtp_losses, mtp_hits, agreed = [], [], [], [], []
    for text in texts:
        tokens = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        output = model(input_ids=tokens, labels=tokens, output_mtp_logits=True)
        main, mtp = output.logits[0].log_softmax(-1), output.mtp_logits[0][0].log_softmax(-1)
        for i, token in enumerate(tokens[0, 1:]):
            losses.append(-main[i, token])
            hits.append(main[i].argmax() == token)
        for i, token in enumerate(tokens[0, 2:]):
            mtp_losses.append(-mtp[i, token])
            mtp_hits.append(mtp[i].argmax() == token)
            agreed.append(mtp[i].argmax() == main[i + 1].argmax())
    expected = {
        "loss": losses,
        "accuracy": hits,
        "mtp_loss": mtp_losses,
        "mtp_accuracy": mtp_hits,
        "mtp_agreement": agreed,
    }
    for name, values in expected.items():
        mean = torch.stack(values).float().mean().item()
        assert measured[name] == pytest.approx(mean, rel=1e-4), name  # float32, sums of different order


def test_loads_are_of_every_router_and_the_mode_is_restored(model, tokenizer):
    rows = pack(["x = 1\n" * 40], tokenizer, 32)
    model.train()
    measured = measure(model, rows)
    assert model.training
    model.eval()
    assert {"max_vio_1", "max_vio_2"} <= measured.keys() and "max_vio_0" not in measured  # layer 0 is dense
    # From all loads equal to every token choosing the same two of eight.
    assert 0 <= measured["max_vio_1"] <= 3 and 0 <= measured["max_vio_2"] <= 3
