"""Loads a model by its repository id, pushes it under another, and loads that: `python hub_client.py ID NEW_ID OUT`.

A process of its own, because huggingface_hub reads `HF_ENDPOINT` and `HF_HOME` when it is imported. Writes the logits
of the tokens 0 … 15 for both to OUT, a safetensors file.
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import deepseek_hf.modeling  # noqa: F401  (registers the model types)

repo, new_repo, out = sys.argv[1:]
input_ids = torch.arange(16)[None]
model = AutoModelForCausalLM.from_pretrained(repo)
model.push_to_hub(new_repo, max_shard_size="300KB", token="hf_local")
again = type(model).from_pretrained(new_repo)
with torch.no_grad():
    save_file({"loaded": model(input_ids).logits, "pushed": again(input_ids).logits}, out)
