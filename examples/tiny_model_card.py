"""The model card of the tiny model, written from what was measured on the saved weights."""

import platform
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tiny_held_out import ExpertLoads, measure

PROMPTS = (
    # They end where a word can begin: a line break and the indentation after it are one token.
    "def __init__(self, name, value):\n        ",
    'class Stack:\n    """A last-in first-out stack."""\n\n    def __init__(self):\n        ',
    "def read_json(path):\n    ",
    "for key, value in",
)

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: [code, en]
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
tags: [deepseek_v3, mixture-of-experts, multi-head-latent-attention, multi-token-prediction]
---

# tiny-deepseek-v3

A DeepSeek-V3 of {total:.2f}M parameters ({active:.2f}M active a token), pretrained from scratch on a CPU on the
source of Python {python}'s standard library. It has every part of the architecture: latent attention, routed and
shared experts balanced by the router bias, and a multi-token-prediction (MTP) layer. It is made for examples and
tests: it writes text that looks like Python, and knows nothing.

```python
import deepseek_hf.modeling  # registers the classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/tiny-deepseek-v3", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("examples/tiny-deepseek-v3")
inputs = tokenizer("def read_json(path):\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```

## Data

{data}

Modules are held out by a hash of their path. Documents are packed into rows of {row_length} tokens without attention
across documents; the model has seen no longer context, whatever `max_position_embeddings` admits.

## Training

{steps} steps of {rows} rows, {tokens:.1f}M tokens ({epochs:.1f} epochs), in {minutes:.0f} minutes; AdamW, peak
learning rate {learning_rate:g}, router bias speed {bias_speed:g}, MTP loss weight {mtp_weight:g}. Made by
`python examples/pretrain_tiny.py --output_dir <folder> --max_minutes {minutes:.0f}`.

![Training and held-out loss](loss_curve.png)

## Held-out figures

On {held_out_tokens:,} tokens of {held_out_files} modules that were not trained on, with the saved bfloat16 weights
computed in float32. The MTP head predicts the token after next; how often its first choice is also the main head's,
along the true text, stands for the share of drafts that greedy speculative decoding accepts.

| | main head | MTP head |
| --- | --- | --- |
| loss (nats a token) | {loss:.3f} | {mtp_loss:.3f} |
| top-1 accuracy | {accuracy:.1%} | {mtp_accuracy:.1%} |
| same first choice as the main head | | {mtp_agreement:.1%} |

Share of the tokens that each expert got there (even would be {even:.1%}; layer {mtp_layer} is the MTP layer):

{loads}

## What it writes

Greedy continuations; the prompt is everything up to the mark `▮`.

{samples}
"""


def write_model_card(output_dir: Path, model, tokenizer, corpus, held_out_rows, history, arguments) -> None:
    """Writes `README.md` and `loss_curve.png` into `output_dir`; `history` is the Trainer's log."""
    config = model.config
    with ExpertLoads(model) as loads:
        metrics = measure(model, held_out_rows)
    total, active = count_parameters(model)
    train = [entry for entry in history if "main_loss" in entry]
    steps = history[-1]["step"]
    plot_losses(train, [entry for entry in history if "eval_loss" in entry], output_dir / "loss_curve.png")
    held_out_tokens = sum(len(row["input_ids"]) for row in held_out_rows)
    card = CARD.format(
        total=total / 1e6,
        active=active / 1e6,
        python=platform.python_version(),
        data="\n".join(f"- {line}" for line in str(corpus).splitlines()),
        row_length=arguments.row_length,
        steps=steps,
        rows=arguments.rows_per_step,
        tokens=steps * arguments.rows_per_step * arguments.row_length / 1e6,
        epochs=history[-1]["epoch"],
        minutes=history[-1]["train_runtime"] / 60,
        learning_rate=arguments.learning_rate,
        bias_speed=arguments.router_bias_speed,
        mtp_weight=config.mtp_loss_weight,
        held_out_tokens=held_out_tokens,
        held_out_files=len(corpus.held_out),
        even=1 / config.n_routed_experts,
        mtp_layer=config.num_hidden_layers,
        loads=load_table(loads.loads),
        samples="\n\n".join(f"```\n{greedy(model, tokenizer, prompt)}\n```" for prompt in PROMPTS),
        **{key: metrics[key] for key in ("loss", "accuracy", "mtp_loss", "mtp_accuracy", "mtp_agreement")},
    )
    (output_dir / "README.md").write_text(card, encoding="utf-8")


def count_parameters(model) -> tuple[int, int]:
    """All parameters, and those that one token's next-token prediction uses: without the experts that it is not routed
    to, and without the MTP layers."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    active = 0
    for name, parameter in model.named_parameters():
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
        if layer < config.num_hidden_layers:
            is_routed = ".mlp.experts." in name
            share = config.num_experts_per_tok / config.n_routed_experts if is_routed else 1
            active += round(parameter.numel() * share)
    return total, active


def load_table(loads: dict[int, torch.Tensor]) -> str:
    experts = len(next(iter(loads.values())))
    lines = [
        "| layer | " + " | ".join(str(expert) for expert in range(experts)) + " | max / mean - 1 |",
        "| --- " * (experts + 2) + "|",
    ]
    for layer, load in sorted(loads.items()):
        shares = " | ".join(f"{share:.1%}" for share in (load / load.sum()).tolist())
        lines.append(f"| {layer} | {shares} | {(load.max() / load.float().mean() - 1).item():.2f} |")
    return "\n".join(lines)


def greedy(model, tokenizer, prompt: str, max_new_tokens: int = 80) -> str:
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return f"{prompt}▮{tokenizer.decode(output[inputs['input_ids'].shape[1] :])}"


def plot_losses(train: list[dict], held_out: list[dict], file: Path) -> None:
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    steps = [entry["step"] for entry in train]
    held_out_steps = [entry["step"] for entry in held_out]
    for color, name, key, held_out_key in (
        ("tab:blue", "main head", "main_loss", "eval_loss"),
        ("tab:orange", "MTP head", "mtp_loss", "eval_mtp_loss"),
    ):
        axes.plot(steps, [entry[key] for entry in train], color=color, alpha=0.4, label=f"{name}, training")
        values = [entry[held_out_key] for entry in held_out]
        axes.plot(held_out_steps, values, "o-", color=color, markersize=3, label=f"{name}, held-out")
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(file, dpi=110)
