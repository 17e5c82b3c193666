"""A LoRA training step, forward and backward, with adapters on the attention projections."""

from collections.abc import Iterator
from functools import partial

import torch
from measuring import alternate
from models import Pair, assert_agreement, build_pair, random_tokens
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from results import Result, Setup, Target, extra_memory, timed
from work import Work, causal_attention, weights

LAYERS, REPETITIONS = 2, 2
TOKENS, CHECKED_TOKENS = 4096, 256
SPEED_TARGET, MEMORY_TARGET = 1.6, 0.5
# `init_lora_weights=False` draws B too, which otherwise is zero and lets no gradient reach A.
ADAPTER = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)


def adapted(pair: Pair) -> tuple[PeftModel, PeftModel]:
    """Ours and transformers' with the same adapter, in training mode. Changes the pair's modules in place."""
    ours, theirs = get_peft_model(pair.ours, ADAPTER), get_peft_model(pair.theirs, ADAPTER)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    return ours.train(), theirs.train()


def lora_step(model: PeftModel, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of the row `tokens` [B, T] after forward and backward; the adapter's gradients are left in the model."""
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def check_lora(ours: PeftModel, theirs: PeftModel, tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative difference of the adapter's gradients, after checking that of the losses; warms both up."""
    assert_agreement("LoRA loss", lora_step(ours, tokens), lora_step(theirs, tokens), dtype)
    our_gradient, their_gradient = (
        torch.cat([p.grad.float().flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad])
        for model in (ours, theirs)
    )
    return assert_agreement("LoRA gradients", our_gradient, their_gradient, dtype)


def lora_work(pair: Pair, tokens: int) -> tuple[Work, Work]:
    """Frozen weights forward, and once more backward for the gradient of their inputs; attention forward, and twice
    that backward. What is left out (the adapter) and what is too much (the first layer's inputs need no gradient) are
    a few hundredths."""
    attention = causal_attention(pair.config, 1, tokens, pair.ours.dtype.itemsize)
    return weights(pair.ours, pair.config, tokens).times(2), attention.times(3)


def run(setup: Setup) -> Iterator[Result]:
    """Speed of a step, and its memory beyond weights and adapter."""
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    work = lora_work(pair, TOKENS)
    ours_adapted, theirs_adapted = adapted(pair)
    difference = check_lora(ours_adapted, theirs_adapted, random_tokens(pair, 1, CHECKED_TOKENS), setup.dtype)
    tokens = random_tokens(pair, 1, TOKENS)
    compared = alternate(
        partial(lora_step, ours_adapted, tokens),
        partial(lora_step, theirs_adapted, tokens),
        setup.repetitions or REPETITIONS,
        setup.machine,
    )
    yield timed(
        TOKENS,
        compared,
        work,
        row="lora",
        case=f"{TOKENS} tokens, attention projections",
        layers=layers,
        target=Target(SPEED_TARGET),
        difference=difference,
    )
    yield extra_memory(
        compared,
        row="lora",
        case=f"{TOKENS} tokens, extra memory",
        layers=layers,
        target=Target(MEMORY_TARGET, at_most=True),
    )
