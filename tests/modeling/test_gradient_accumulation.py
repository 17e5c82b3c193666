"""Gradients of micro-batches add up to those of the whole batch, with all parts of the loss switched on.

Tolerance: float32 gradients of magnitude up to 10, summed in another order: 2e-5.
"""

import pytest
import torch
from one_step import LOSSES, gradients_of_one_step
from small_models import FAMILIES, random_ids, small_model

TOLERANCE = {"atol": 2e-5, "rtol": 0}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, f"{name} is not trained"
        torch.testing.assert_close(found[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_of_one_size_with_the_mean_loss(family):
    model = small_model(family, **LOSSES).train()
    ids = random_ids(4, 12)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for row in ids.split(1):
        (model(row, labels=row).loss / 4).backward()
    assert_same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_num_items_in_batch_makes_all_losses_shares_of_the_batch(family):
    """What the Trainer relies on, without a Trainer: rows of different lengths, one of them without any target."""
    model = small_model(family, **LOSSES).train()
    rows = [random_ids(1, length, seed=length) for length in (12, 7, 4)]
    labels = [rows[0], rows[1], torch.full_like(rows[2], -100)]
    items = torch.tensor(11 + 6)
    losses = [model(row, labels=label, num_items_in_batch=items).loss for row, label in zip(rows, labels, strict=True)]
    together = model(
        torch.cat([torch.nn.functional.pad(row, (0, 12 - row.shape[1])) for row in rows]),
        attention_mask=torch.stack([torch.arange(12) < row.shape[1] for row in rows]).long(),
        labels=torch.cat([torch.nn.functional.pad(row, (0, 12 - row.shape[1]), value=-100) for row in labels]),
        num_items_in_batch=items,
    )
    torch.testing.assert_close(torch.stack(losses).sum(), together.loss, **TOLERANCE)
    assert losses[2] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_with_accumulation_takes_the_step_of_the_whole_batch(family, tmp_path):
    expected = gradients_of_one_step(family, batch_size=4, accumulation=1, folder=tmp_path)
    for batch_size, accumulation in ((1, 4), (2, 2)):
        found = gradients_of_one_step(family, batch_size=batch_size, accumulation=accumulation, folder=tmp_path)
        assert_same_gradients(found, expected)
