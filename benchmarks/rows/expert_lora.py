"""A LoRA training step with adapters on the routed experts, beside transformers' and beside attention-only LoRA."""

from collections.abc import Iterator
from functools import partial

from measuring import alternate
from models import Pair, build_pair, random_tokens
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from results import Result, Setup, Target, extra_memory, timed
from work import Work, causal_attention, weights

from rows.lora import check_lora, lora_step

LAYERS, REPETITIONS = 3, 3
TOKENS, CHECKED_TOKENS = 512, 64
SPEED_TARGET, MEMORY_TARGET, ATTENTION_TARGET = 3.0, 0.4, 0.75
RANK = {"r": 8, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
ON_EXPERTS = LoraConfig(
    target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], **RANK
)
ON_ATTENTION = LoraConfig(target_modules=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], **RANK)


def step_with(model: PeftModel, adapter: str, tokens) -> None:
    """A step of `adapter` alone; its gradients are left in the model."""
    model.set_adapter(adapter)
    lora_step(model, tokens)


def expert_lora_work(pair: Pair, tokens: int) -> tuple[Work, Work]:
    """All frozen weights forward; backward, for the gradient of their inputs, those after the first adapted experts,
    whose inputs depend on no adapter. Attention forward, and twice that backward in the layers that are left."""
    first_experts, layers = 1, pair.config.num_hidden_layers
    linear = weights(pair.ours, pair.config, tokens)
    for module in (pair.ours.lm_head, *pair.ours.model.layers[first_experts + 1 :]):
        backward = weights(module, pair.config, tokens)
        linear = Work(linear.flops + backward.flops, linear.bytes + backward.bytes)
    attention = causal_attention(pair.config, 1, tokens, pair.ours.dtype.itemsize)
    return linear, attention.times(1 + 2 * (layers - first_experts - 1) / layers)


def run(setup: Setup) -> Iterator[Result]:
    """Speed of a step and its memory beyond the weights; then ours against our own attention-only LoRA."""
    layers = setup.layers or LAYERS
    pair = build_pair(layers, setup.device, setup.dtype)
    work = expert_lora_work(pair, TOKENS)
    ours, theirs = (get_peft_model(model, ON_EXPERTS, "experts").train() for model in pair)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours, adapter_name="experts"), "experts")
    ours.add_adapter("attention", ON_ATTENTION)
    ours.set_adapter("experts")
    difference = check_lora(ours, theirs, random_tokens(pair, 1, CHECKED_TOKENS), setup.dtype)

    tokens = random_tokens(pair, 1, TOKENS)
    repetitions = setup.repetitions or REPETITIONS
    on_experts, on_attention = (partial(step_with, ours, adapter, tokens) for adapter in ("experts", "attention"))
    compared = alternate(on_experts, partial(step_with, theirs, "experts", tokens), repetitions, setup.machine)
    yield timed(
        TOKENS,
        compared,
        work,
        row="expert-lora",
        case=f"{TOKENS} tokens, r = 8 on the routed experts",
        layers=layers,
        target=Target(SPEED_TARGET),
        difference=difference,
    )
    yield extra_memory(
        compared,
        row="expert-lora",
        case=f"{TOKENS} tokens, extra memory",
        layers=layers,
        target=Target(MEMORY_TARGET, at_most=True),
    )
    yield timed(
        TOKENS,
        alternate(on_experts, on_attention, repetitions, setup.machine),
        work,
        row="expert-lora",
        case=f"{TOKENS} tokens, against attention-only LoRA",
        layers=layers,
        target=Target(ATTENTION_TARGET),
        note="the column transformers holds our own class with LoRA on the attention projections",
    )
