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
from torch.utils.data import DataLoader
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
from deepseek_hf.finetune.adapter import add_adapter, check_same_base, describe_adapter
from deepseek_hf.finetune.arguments import FinetuningArguments, LoraArguments, parse_recipe
from deepseek_hf.finetune.data import load_chat_dataset, read_conversations
from deepseek_hf.finetune.esft import EXPERT_CONFIG_NAME, ExpertConfig, specialize
from deepseek_hf.finetune.expert_scores import collect_expert_scores
from deepseek_hf.finetune.loss_curve import save_loss_curve
from deepseek_hf.finetune.mtp import MtpLossWeightCallback, freeze_all_but_mtp
from deepseek_hf.finetune.per_expert import export_per_expert
from deepseek_hf.finetune.router_bias import RouterBiasCallback
from deepseek_hf.finetune.trainer import DeepseekTrainer
from deepseek_hf.modeling.mtp import init_mtp_from_last_layer

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3")


def checkpoint_to_resume(args: FinetuningArguments, lora: bool, esft: bool) -> str | None:
    """The folder that `resume_from_checkpoint` means (`true`: the last checkpoint in `output_dir`), or `None`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it holds a whole model and this run trains an adapter (`lora`) or some experts (`esft`), or the
            other way round.
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
        if (Path(found) / EXPERT_CONFIG_NAME).exists() != esft:
            raise ValueError(
                f"resume_from_checkpoint={found} was {'not ' if esft else ''}made by ESFT; "
                f"{'leave out' if esft else 'set'} expert_config or esft_top_p."
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


def check_what_is_trained(lora_args: LoraArguments, args: FinetuningArguments) -> None:
    """Raises `ValueError` for arguments that exclude one another."""
    if (lora_args.lora or lora_args.esft) and (args.train_mtp_only or args.init_mtp_from_last_layer):
        field = "train_mtp_only" if args.train_mtp_only else "init_mtp_from_last_layer"
        raise ValueError(
            f"{field}={getattr(args, field)} trains MTP layers whole; set lora to false, and no experts to train."
        )
    if args.train_mtp_only and args.mtp_loss_weight is not None and not any(args.mtp_loss_weight):
        raise ValueError(
            f"mtp_loss_weight={args.mtp_loss_weight} leaves train_mtp_only nothing to do; accepted: a weight above 0."
        )
    if (lora_args.lora or lora_args.esft) and args.router_bias_speed:
        raise ValueError(
            f"router_bias_speed={args.router_bias_speed} would move biases that neither an adapter holds nor ESFT "
            "saves; set it to 0.0, or train all weights."
        )
    if lora_args.expert_config is not None and lora_args.esft_top_p is not None:
        raise ValueError("expert_config names the experts and esft_top_p would choose them; set one of the two.")
    if lora_args.esft_top_p is not None and not 0 < lora_args.esft_top_p <= 1:
        raise ValueError(f"esft_top_p={lora_args.esft_top_p}; accepted: above 0, up to 1.")
    if lora_args.esft and lora_args.lora and lora_args.lora_targets != ["experts"]:
        raise ValueError(f"lora_targets={lora_args.lora_targets}; accepted with ESFT: [experts].")
    if lora_args.per_expert_adapter and not lora_args.lora:
        raise ValueError(
            "per_expert_adapter is true and lora false; accepted: an adapter, or per_expert_adapter false."
        )


def experts_to_train(
    lora_args: LoraArguments,
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: FinetuningArguments,
) -> ExpertConfig:
    """The experts that `expert_config` names, or else those that score highest on `dataset`, of which each process
    runs its share; scores and heat map then lie in `output_dir`."""
    if lora_args.expert_config is not None:
        return ExpertConfig.read(lora_args.expert_config)
    processes = PartialState()
    batches = DataLoader(
        dataset.shuffle(args.seed).shard(processes.num_processes, processes.process_index),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
    model.to(args.device)
    scores = collect_expert_scores(model, batches, lora_args.esft_tokens // processes.num_processes)
    scores.merge_ranks()
    chosen = scores.choose(lora_args.esft_score, lora_args.esft_top_p)
    if processes.is_main_process:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        scores.write(folder / "expert_scores.json")
        scores.save_heat_map(folder / "expert_scores.png", lora_args.esft_score, chosen)
    return ExpertConfig(chosen)


def describe_experts(config: ExpertConfig, num_experts: int) -> str:
    counts = [len(chosen) for chosen in config.experts.values()]
    return (
        f"{sum(counts)} of {num_experts * len(counts)} experts ({min(counts)} to {max(counts)} a layer); shared "
        f"experts: {config.shared_experts}, other modules: {config.non_expert_modules}"
    )


def main(argv: list[str]) -> None:
    model_args, data_args, lora_args, args = parse_recipe(argv)
    check_what_is_trained(lora_args, args)
    if lora_args.expert_config is not None:
        ExpertConfig.read(lora_args.expert_config)  # before work is lost
    checkpoint = checkpoint_to_resume(args, lora_args.lora, lora_args.esft)
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
    if lora_args.esft:
        if checkpoint is not None:  # the experts that it holds
            expert_config = ExpertConfig.read(Path(checkpoint) / EXPERT_CONFIG_NAME)
        else:
            expert_config = experts_to_train(lora_args, model, train_dataset, tokenizer, args)
        if lora_args.lora and (expert_config.shared_experts or expert_config.non_expert_modules):
            raise ValueError(
                f"expert_config has shared_experts={expert_config.shared_experts} and "
                f"non_expert_modules={expert_config.non_expert_modules}; accepted with lora: false for both."
            )
        model = specialize(model, expert_config)
        processes.print(f"ESFT trains {describe_experts(expert_config, model.config.n_routed_experts)}")
    if lora_args.lora:
        model = add_adapter(
            model, lora_args.lora_r, lora_args.lora_alpha, lora_args.lora_targets, **lora_args.peft_arguments
        )
        if checkpoint is not None:
            check_same_base(checkpoint, model)
        processes.print(describe_adapter(model))
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
    metrics["trained_parameters"] = model.num_parameters(only_trainable=True)
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
    if lora_args.per_expert_adapter and processes.is_main_process:
        export_per_expert(args.output_dir, Path(args.output_dir) / "per_expert")
        if args.push_to_hub:
            trainer.push_to_hub(commit_message="The same adapter with one LoRA an expert")
    processes.print(f"\nSaved to {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
