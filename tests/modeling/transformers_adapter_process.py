"""What transformers and PEFT alone make of adapters: `python transformers_adapter_process.py FOLDER ...`.

Each folder holds a model in `base` and an adapter in `adapter`. Writes the logits of the two together
(`logits.safetensors`), and an adapter of its own with the same targets (`theirs`) with its logits beside it.
A process of its own, because importing `deepseek_hf.modeling` puts this project's classes behind the Auto classes.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers_process import write_logits


def save_own(base: Path, config: LoraConfig, folder: Path) -> None:
    torch.manual_seed(1)
    config.init_lora_weights, config.inference_mode = False, False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(folder)
    write_logits(model.merge_and_unload(), folder)


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
        config = adapted.peft_config["default"]
        write_logits(adapted.merge_and_unload(), folder)
        save_own(folder / "base", config, folder / "theirs")
    assert not any(name.startswith("deepseek_hf") for name in sys.modules)
