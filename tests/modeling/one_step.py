"""One optimizer step of transformers' Trainer on rows of different lengths; shared with `distributed_worker.py`."""

import torch
from small_models import random_ids, small_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

# Four rows; the second begins with a prompt of five tokens that is not learnt.
LENGTHS = [12, 9, 5, 16]
# Weights on the losses that make each of them matter.
LOSSES = {"num_nextn_predict_layers": 2, "mtp_loss_weight": 0.5, "aux_loss_alpha": 0.5}


def rows() -> list[dict[str, torch.Tensor]]:
    each = [random_ids(length, seed=length) for length in LENGTHS]
    labels = [row.clone() for row in each]
    labels[1][:5] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(each, labels, strict=True)]


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads on the right."""
    mask = [torch.ones_like(row["input_ids"]) for row in batch]
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in batch], batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence([row["labels"] for row in batch], batch_first=True, padding_value=-100),
    }


def gradients_of_one_step(family: str, batch_size: int, accumulation: int, folder, **fields) -> dict[str, torch.Tensor]:
    """Parameter name → gradient, read off the weights before and after one step of SGD with a learning rate of 1."""
    model = small_model(family, **{**LOSSES, **fields})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate).train()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
