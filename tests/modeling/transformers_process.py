"""What transformers alone makes of checkpoints: `python transformers_process.py LOAD SAVE`, two folders of checkpoints.

Loads each checkpoint in LOAD, and makes and saves a random model for each `config.json` in SAVE, all with the classes
that transformers' Auto classes name. Beside each checkpoint it writes `logits.safetensors`: those of `input_ids()`, in
float32.
A process of its own, because importing `deepseek_hf.modeling` puts this project's classes behind the Auto classes.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def input_ids() -> torch.Tensor:
    return torch.arange(40).view(2, 20) * 7 % 61


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights that keep the activations' size, wide enough that scores differ clearly between experts and keys."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.normal_(1.0, 0.2)
        elif tensor.dim() == 1:
            tensor.normal_(0.0, 0.1)
        else:
            tensor.normal_(0.0, 1.5 * tensor.shape[-1] ** -0.5)


@torch.no_grad()
def write_logits(model: torch.nn.Module, folder: Path) -> None:
    assert type(model).__module__.startswith("transformers.models."), type(model)
    save_file({"logits": model(input_ids()).logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    load, save = map(Path, sys.argv[1:])
    for folder in sorted(load.iterdir()):
        write_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)
    for folder in sorted(save.iterdir()):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        randomize(model)
        write_logits(model, folder)
        model.save_pretrained(folder, max_shard_size="100KB")
    assert not any(name.startswith("deepseek_hf") for name in sys.modules)
