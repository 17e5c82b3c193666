import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer

from deepseek_hf.finetune import DeepseekTrainer, load_chat_dataset
from deepseek_hf.finetune.arguments import FinetuningArguments
from deepseek_hf.modeling import DeepseekV3ForCausalLM


@pytest.fixture
def make_trainer(model, files, tokenizer, tmp_path):
    dataset, _ = load_chat_dataset(str(files[0]), tokenizer, 64)

    def make(trainer_class=DeepseekTrainer, collator=None, **kwargs):
        kwargs = {"max_steps": 4, "logging_steps": 4, "save_strategy": "no", "learning_rate": 1e-3} | kwargs
        args = FinetuningArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **kwargs)
        return trainer_class(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(8)),
            data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        )

    return make


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_is_that_of_the_stock_trainer(make_trainer, model):
    start = weights(model)
    make_trainer(Trainer).train()
    stock = weights(model)
    model.load_state_dict(start)
    make_trainer().train()
    # The same but for the order of summation in the loss, float32 noise that AdamW divides by its own size.
    torch.testing.assert_close(weights(model), stock, rtol=0, atol=5e-5)


def test_parts_of_the_loss_are_logged(make_trainer, model):
    """loss = cross-entropy + mtp_loss_weight·mtp_loss + aux_loss, each averaged over the steps: with a learning
    rate of zero, as the model gives them for the whole data."""
    trainer = make_trainer(max_steps=1, logging_steps=1, learning_rate=0.0, per_device_train_batch_size=72)
    trainer.train()
    logged = trainer.state.log_history[0]
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    output = model(**batch, num_items_in_batch=num_items)
    # logs are rounded to float32 in one place and to float64 in the other
    assert logged["mtp_loss"] == pytest.approx(output.mtp_loss.item(), rel=1e-5)
    assert logged["aux_loss"] == pytest.approx(output.aux_loss.item(), rel=1e-5)
    assert logged["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_accumulated_batches_log_and_train_as_one(make_trainer, model):
    """Rows have different numbers of targets, so this holds only if all are divided by the batch's number."""
    start = weights(model)
    whole = make_trainer(per_device_train_batch_size=8, logging_steps=1)
    whole.train()
    expected = weights(model)
    model.load_state_dict(start)
    parts = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, logging_steps=1)
    parts.train()
    # Four steps of AdamW divide gradients by their own size: float32 noise of 1e-7 in them shows as about 1e-5.
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=5e-5)
    for one, other in zip(whole.state.log_history[:4], parts.state.log_history[:4], strict=True):
        for name in ("loss", "mtp_loss", "aux_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_packed_rows_train_as_padded_ones(make_trainer, model):
    """Cross-entropy and MTP loss alone: with seq_aux the balance loss of a packed row is that of one sequence."""
    model.config.aux_loss_alpha = 0.0
    start = weights(model)
    padded = make_trainer(logging_steps=1)
    padded.train()
    expected = weights(model)
    model.load_state_dict(start)
    packed = make_trainer(logging_steps=1, collator=DataCollatorWithFlattening())
    packed.train()
    assert "aux_loss" not in packed.state.log_history[0]
    for one, other in zip(padded.state.log_history[:4], packed.state.log_history[:4], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["mtp_loss"] == pytest.approx(other["mtp_loss"], rel=1e-5)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("option", ["resume_from_checkpoint", "load_best_model_at_end"])
def test_experts_come_back_from_a_checkpoint(make_trainer, model, tmp_path, option):
    trainer = make_trainer(
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.5 if option == "load_best_model_at_end" else 1e-3,  # diverges: the first checkpoint is best
        load_best_model_at_end=option == "load_best_model_at_end",
    )
    trainer.train()
    if option == "resume_from_checkpoint":
        checkpoint = tmp_path / "checkpoint-4"
        model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
        trainer.train(resume_from_checkpoint=str(checkpoint))  # max_steps are done: it only loads
    else:
        checkpoint = tmp_path / "checkpoint-2"
        assert trainer.state.best_model_checkpoint == str(checkpoint)
    saved = DeepseekV3ForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(weights(model), saved.state_dict(), rtol=0, atol=0)
