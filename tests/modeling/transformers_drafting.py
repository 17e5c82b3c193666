"""What transformers alone drafts: `python transformers_drafting.py CHECKPOINT`. Prints, as JSON, the tokens of a greedy
continuation with `use_mtp=True` and how many forwards of the main model they took.

A process of its own, because importing `deepseek_hf.modeling` puts this project's classes behind the Auto classes.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def prompt() -> torch.Tensor:
    return torch.arange(3, 15)[None]


SETTINGS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "use_mtp": True}

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(True))
    ids = prompt()
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS)
    print(json.dumps({"tokens": tokens.tolist(), "forwards": len(forwards)}))
