"""Fine-tunes a DeepSeek model on conversations.

    accelerate launch finetune/train.py finetune/recipes/quickstart.yaml
    python -m deepseek_hf.finetune.train finetune/recipes/quickstart.yaml --learning_rate 1e-4

`--help` lists the fields that a recipe and the command line can set. What can be wrong with them or with the data
is checked before the model is loaded.
"""

import shutil
import sys
from pathlib import Path

import datasets
from accelerate import PartialState
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

import deepseek_hf.modeling  # noqa: F401  (registers the DeepSeek models with the Auto classes)
from deepseek_hf.finetune.adapter import add_adapter, check_same_base
from deepseek_hf.finetune.arguments import FinetuningArguments, parse_recipe
from deepseek_hf.finetune.data import load_chat_dataset, read_conversations
from deepseek_hf.finetune.loss_curve import save_loss_curve
from deepseek_hf.finetune.mtp import MtpLossWeightCallback, freeze_all_but_mtp
from deepseek_hf.finetune.router_bias import RouterBiasCallback
from deepseek_hf.finetune.trainer import DeepseekTrainer
from deepseek_hf.modeling.mtp import init_mtp_from_last_layer

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3")


def checkpoint_to_resume(args: FinetuningArguments, lora: bool) -> str | None:
    """The folder that `resume_from_checkpoint` means (`true`: the last checkpoint in `output_dir`), or `None`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it holds a whole model and this run trains an adapter (`lora`), or the other way round.
        FileExistsError: the run would mix its results with those of an earlier one.
    """
    resume, output_dir = args.resume_from_checkpoint or "false", Path(args.output_dir)
    if resume.lower() != "false":
        found = output_dir.is_dir() and get_last_checkpoint(output_dir) if resume.lower() == "true" else resume
        if not found or not Path(found).is_dir():
            raise FileNotFoundError(
                f"resume_from_checkpoint={resume}: there is no such checkpoint (output_dir={output_dir})."
            )
        if (Path(found) / PEFT_CONFIG_NAME).exists() != lora:
            raise ValueError(
                f"resume_from_checkpoint={found} holds {'a whole model' if lora else 'an adapter'}; "
                f"set lora to {str(not lora).lower()}."
            )
        return found
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir={output_dir} is not empty: choose another folder, or set resume_from_checkpoint (true, or "
            "the path of a checkpoint) or overwrite_output_dir."
        )
    return None


def delete_checkpoints(output_dir: str) -> None:
    """Deletes what an earlier run left to resume from, so that it is not taken for this run's."""
    for checkpoint in sort_checkpoints(output_dir) if Path(output_dir).is_dir() else []:
        print(f"overwrite_output_dir: deleting {checkpoint}")
        shutil.rmtree(checkpoint)


def first_question(path: str) -> list[dict[str, str]]:
    """The first conversation of the file, up to where the assistant speaks for the first time."""
    messages = read_conversations(path)[0]["messages"]
    return messages[: [message["role"] for message in messages].index("assistant")]


def greedy_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    max_new_tokens: int,
) -> str:
    model.eval()
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str]) -> None:
    model_args, data_args, lora_args, args = parse_recipe(argv)
    if lora_args.lora and args.router_bias_speed:
        raise ValueError(
            f"router_bias_speed={args.router_bias_speed} would move biases that an adapter does not hold; set it "
            "to 0.0, or lora to false."
        )
    if lora_args.lora and (args.train_mtp_only or args.init_mtp_from_last_layer):
        field = "train_mtp_only" if args.train_mtp_only else "init_mtp_from_last_layer"
        raise ValueError(f"{field}={getattr(args, field)} trains MTP layers whole; set lora to false.")
    checkpoint = checkpoint_to_resume(args, lora_args.lora)
    processes = PartialState()
    processes.wait_for_everyone()  # all of them have looked at output_dir before one writes there
    if processes.is_main_process and checkpoint is None:
        delete_checkpoints(args.output_dir)
    if not processes.is_main_process:
        datasets.disable_progress_bars()
    set_seed(args.seed)

    name = model_args.model_name_or_path
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_name_or_path={name} has model_type={model_type!r}; accepted: {', '.join(MODEL_TYPES)}."
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    train_dataset, report = load_chat_dataset(
        data_args.train_file, tokenizer, data_args.max_length, data_args.long_rows
    )
    processes.print(report)
    eval_dataset = question = None
    if data_args.eval_file is not None:
        eval_dataset, report = load_chat_dataset(
            data_args.eval_file, tokenizer, data_args.max_length, data_args.long_rows
        )
        processes.print(report)
        question = first_question(data_args.eval_file) if data_args.sample_tokens else None

    model = AutoModelForCausalLM.from_pretrained(name, dtype=model_args.dtype)
    if args.init_mtp_from_last_layer:
        init_mtp_from_last_layer(model, args.init_mtp_from_last_layer)
    if args.train_mtp_only:
        freeze_all_but_mtp(model)
    if lora_args.lora:
        model = add_adapter(model, lora_args.lora_r, lora_args.lora_alpha, lora_args.lora_targets)
        if checkpoint is not None:
            check_same_base(checkpoint, model)
        if processes.is_main_process:
            model.print_trainable_parameters()
    callbacks = [RouterBiasCallback(args.router_bias_speed)]
    if args.mtp_loss_weight is not None:
        callbacks.append(MtpLossWeightCallback(args.mtp_loss_weight))
    trainer = DeepseekTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=DataCollatorWithFlattening() if data_args.packing else DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )

    before, answer_before, history = {}, None, []
    if eval_dataset is not None:
        before = trainer.evaluate(metric_key_prefix="eval_before")
        history = [{"step": 0, "eval_loss": before["eval_before_loss"]}]
    if question is not None:
        answer_before = greedy_answer(model, tokenizer, question, data_args.sample_tokens)

    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | before
    if eval_dataset is not None:
        metrics |= trainer.evaluate()
        processes.print(f"\nHeld-out loss: {metrics['eval_before_loss']:.3f} → {metrics['eval_loss']:.3f}")
    if question is not None:
        answer_after = greedy_answer(model, tokenizer, question, data_args.sample_tokens)
        for title, text in (
            ("Question", question[-1]["content"]),
            ("Before", answer_before),
            ("After", answer_after),
        ):
            processes.print(f"\n{title}:\n{text}")

    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)
    if processes.is_main_process:
        save_loss_curve(history + trainer.state.log_history, Path(args.output_dir) / "loss.png")
    trainer.save_model()  # last: with push_to_hub it uploads all of output_dir
    processes.print(f"\nSaved to {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
