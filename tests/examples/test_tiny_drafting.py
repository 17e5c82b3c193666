"""The tiny pretrained model drafts for itself on code that it was not trained on."""

from pathlib import Path

import torch
from stdlib_corpus import load_corpus
from transformers import AutoTokenizer

from deepseek_hf.modeling import DeepseekV3ForCausalLM

TINY = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3"


def test_more_than_one_and_a_half_tokens_a_forward():
    """Greedy, after the first 128 tokens of held-out modules; the same tokens as without drafting."""
    model = DeepseekV3ForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    texts = [text[:2000] for text in load_corpus().held_out.values() if len(text) > 2000][:8]
    prompts = tokenizer(texts, return_tensors="pt", truncation=True, max_length=128)
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    output = model.generate(**prompts, **settings, use_mtp=True, return_dict_in_generate=True)
    assert output.sequences.equal(model.generate(**prompts, **settings))
    assert output.statistics.tokens_per_forward >= 1.5
