"""Pretrains a tiny DeepSeek-V3 from scratch on the source of Python's standard library, on a CPU, against the clock.

    python examples/pretrain_tiny.py --output_dir output/tiny-deepseek-v3 --max_minutes 80

When other programs use the same cores, set `OMP_WAIT_POLICY=PASSIVE`: threads that wait for each other by spinning then
take the time that the other one needs.

Everything of the architecture is there: latent attention, fine-grained and shared experts balanced by the router bias
alone (plus a very small sequence-wise loss), and one multi-token-prediction layer. The output folder holds the bfloat16
weights in the official layout, the tokenizer, and a model card with what was measured.
"""

import copy
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from stdlib_corpus import Corpus, load_corpus
from tiny_held_out import measure
from tiny_model_card import write_model_card
from tiny_tokenizer import train_tokenizer
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from deepseek_hf.configuration import DeepseekV3Config
from deepseek_hf.finetune.router_bias import RouterBiasCallback
from deepseek_hf.finetune.trainer import DeepseekTrainer
from deepseek_hf.modeling import DeepseekV3ForCausalLM

TINY = DeepseekV3Config(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    mtp_loss_weight=0.3,
    # Multi-head latent attention: 64 + 16 numbers a token and layer are cached, for 4 heads of 48.
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=48,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    # DeepSeekMoE: one group, 2 of 8 routed experts and a shared one.
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=88,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    aux_loss_alpha=1e-4,
    seq_aux=True,
    tie_word_embeddings=True,
    initializer_range=0.036,  # half of 1/√hidden_size, which is what DeepSeek-V3's 0.006 is for its 7168
)


@dataclass
class PretrainingArguments:
    output_dir: str = field(metadata={"help": "where the model goes"})
    max_minutes: float = field(default=80.0, metadata={"help": "how long to train; the schedule is fitted to it"})
    max_steps: int | None = field(default=None, metadata={"help": "end after so many steps, if that is sooner"})
    learning_rate: float = field(default=3e-3, metadata={"help": "the peak"})
    router_bias_speed: float = field(default=2e-3, metadata={"help": "how far an expert's bias moves a step"})
    rows_per_step: int = field(default=4, metadata={"help": "batch size, in rows"})
    row_length: int = field(default=512, metadata={"help": "tokens a row"})
    log_every: int = field(default=25, metadata={"help": "steps between two lines of training losses"})
    eval_every: int = field(default=250, metadata={"help": "steps between two looks at the held-out modules"})
    seed: int = 0
    overwrite: bool = field(default=False, metadata={"help": "replace the model that output_dir holds"})

    def __post_init__(self):
        if self.max_minutes <= 0:
            raise ValueError(f"max_minutes={self.max_minutes} must be above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1")
        if (Path(self.output_dir) / "config.json").exists() and not self.overwrite:
            raise FileExistsError(
                f"output_dir={self.output_dir!r} already holds a model; name another folder or pass --overwrite"
            )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, row_length: int) -> list[dict[str, list[int]]]:
    """Joins the documents, each between its begin and end tokens, and cuts the stream into rows.

    In a row, `position_ids` restart at each document, which keeps attention and the MTP layer from crossing into
    the next one; `labels` are the tokens, but -100 for a document's first. What is left after the last full row is
    not used.
    """
    encoded = tokenizer(texts)["input_ids"]  # the tokenizer puts the begin token
    stream = [token for document in encoded for token in [*document, tokenizer.eos_token_id]]
    if len(stream) < row_length:
        raise ValueError(f"row_length={row_length} must be at most {len(stream)}, all that {len(texts)} files give")
    rows = []
    for start in range(0, len(stream) - row_length + 1, row_length):
        tokens = stream[start : start + row_length]
        positions, position = [], -1
        for token in tokens:
            position = 0 if token == tokenizer.bos_token_id else position + 1
            positions.append(position)
        labels = [-100 if token == tokenizer.bos_token_id else token for token in tokens]
        rows.append({"input_ids": tokens, "position_ids": positions, "labels": labels})
    print(f"packed {len(texts)} files, {len(stream):,} tokens, into {len(rows)} rows of {row_length}; "
          f"{len(stream) % row_length} tokens left over")  # fmt: skip
    return rows


class Clock(TrainerCallback):
    """Ends training in time, and says what share of it has passed.

    The learning rate follows this share rather than the step number: it warms up over the first 2%, stays, and falls
    linearly to zero over the last half, however fast the machine turns out to be.
    """

    def __init__(self, max_minutes: float, max_steps: int | None):
        self.max_seconds = 60 * max_minutes
        self.max_steps = max_steps or float("inf")
        self.start = None

    def progress(self, step: int) -> float:
        elapsed = 0.0 if self.start is None else time.monotonic() - self.start
        return min(1.0, max(elapsed / self.max_seconds, step / self.max_steps))

    def learning_rate_factor(self, step: int) -> float:
        progress = self.progress(step)
        return min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / 0.5)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        self.bar = tqdm(
            total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}", file=sys.stdout
        )

    def on_step_end(self, args, state, control, **kwargs):
        progress = self.progress(state.global_step)
        self.bar.n = round(100 * progress, 1)
        if progress >= 1:
            control.should_training_stop = True
            control.should_log = control.should_evaluate = True

    def on_log(self, args, state, control, logs, **kwargs):
        self.bar.set_postfix({"step": state.global_step} | {k: f"{v:.3g}" for k, v in logs.items()})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class PretrainingTrainer(DeepseekTrainer):
    """DeepseekTrainer, with the clock's schedule and both heads' held-out losses."""

    def __init__(self, *args, clock: Clock, **kwargs):
        super().__init__(*args, **kwargs)
        self.clock = clock

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, self.clock.learning_rate_factor
        )
        return self.lr_scheduler

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        measured = measure(self.model, eval_dataset or self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def pretrain(arguments: PretrainingArguments, config: DeepseekV3Config = TINY, corpus: Corpus | None = None) -> None:
    """Trains, saves, reloads what was saved, measures it, and writes the model card."""
    set_seed(arguments.seed)
    corpus = corpus or load_corpus()
    print(corpus)
    tokenizer = train_tokenizer(corpus.train.values(), config.vocab_size)
    config = copy.deepcopy(config)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    texts = list(corpus.train.values())
    random.Random(arguments.seed).shuffle(texts)  # neighbours in the alphabet are often of one package
    train_rows = pack(texts, tokenizer, arguments.row_length)
    held_out_rows = pack(list(corpus.held_out.values()), tokenizer, arguments.row_length)

    model = DeepseekV3ForCausalLM(config)
    clock = Clock(arguments.max_minutes, arguments.max_steps)
    trainer = PretrainingTrainer(
        model=model,
        clock=clock,
        args=TrainingArguments(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps or sys.maxsize,  # the clock ends it
            per_device_train_batch_size=arguments.rows_per_step,
            learning_rate=arguments.learning_rate,
            weight_decay=0.1,
            use_cpu=True,
            bf16=True,  # autocast: the weights that are trained stay in float32
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=arguments.log_every,
            eval_strategy="steps",
            eval_steps=arguments.eval_every,
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,  # the clock draws the bar: the number of steps is not known
            seed=arguments.seed,
        ),
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        callbacks=[clock, RouterBiasCallback(arguments.router_bias_speed)],
    )
    trainer.train()

    output_dir = Path(arguments.output_dir)
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(output_dir)
    history = trainer.state.log_history
    (output_dir / "training_log.json").write_text(json.dumps(history, indent=0) + "\n")

    saved = DeepseekV3ForCausalLM.from_pretrained(output_dir, dtype=torch.float32)
    write_model_card(output_dir, saved, tokenizer, corpus, held_out_rows, history, arguments)
    print(f"saved to {output_dir}")


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()
    pretrain(arguments)
