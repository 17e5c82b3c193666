"""The tiny pretrained model of `examples/`, and code that it was not trained on: where random weights would not do."""

import sys
from pathlib import Path

import torch
from results import Setup
from transformers import AutoTokenizer

from deepseek_hf.modeling import DeepseekV3ForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKPOINT = EXAMPLES / "tiny-deepseek-v3"
CHARACTERS = 8  # of source code, at least so many for a token


def tiny_model(setup: Setup) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(CHECKPOINT, dtype=setup.dtype).to(setup.device).eval()


def held_out_beginnings(setup: Setup, files: int, tokens: int) -> list[torch.Tensor]:
    """The first `tokens` tokens, [1, T], of `files` modules of the standard library."""
    sys.path.insert(0, str(EXAMPLES))
    from stdlib_corpus import load_corpus

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    texts = [text for text in load_corpus().held_out.values() if len(text) > CHARACTERS * tokens][:files]
    rows = [tokenizer(text[: CHARACTERS * tokens], return_tensors="pt")["input_ids"][:, :tokens] for text in texts]
    return [row.to(setup.device) for row in rows]
