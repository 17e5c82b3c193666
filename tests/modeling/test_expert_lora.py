"""LoRA on experts, computed with its factors, against PEFT's own way of adding B·A to the weights.

PEFT's way is asked for by a hook on the wrappers, which leaves them to themselves.
"""

import contextlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from small_models import random_ids, small_model
from torch.utils._python_dispatch import TorchDispatchMode

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MLPS = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
# float32 in another order; the logits reach 10, the gradients 1. The largest differences seen were 2e-6 and 1e-6.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def lora(r: int = 4, parameters: list[str] = EXPERTS, **fields) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=8, target_modules=[], target_parameters=parameters, init_lora_weights=False, **fields
    )


def adapted(family: str, *configs: LoraConfig, **model_fields) -> PeftModel:
    """A small model with the adapters "0", "1", … all active, in training mode."""
    model = small_model(family, **model_fields)
    model = get_peft_model(model, configs[0], "0")
    for number, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(number), config)
    model.base_model.set_adapter([str(number) for number in range(len(configs))])
    return model.train()


@contextlib.contextmanager
def by_peft(model: PeftModel):
    hooks = [m.register_forward_pre_hook(lambda *_: None) for m in model.modules() if isinstance(m, ParamWrapper)]
    yield
    for hook in hooks:
        hook.remove()


def step(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one step."""
    model.zero_grad()
    output = model(random_ids(2, 17), labels=random_ids(2, 17))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def assert_same_step(model: PeftModel, **tolerance) -> None:
    logits, gradients = step(model)
    with by_peft(model):
        expected_logits, expected_gradients = step(model)
    torch.testing.assert_close(logits, expected_logits, **tolerance)
    assert gradients.keys() == expected_gradients.keys()
    assert all("lora_" in name for name in gradients) and all(g.abs().max() > 0 for g in gradients.values())
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, **tolerance)


ADAPTERS = {
    "one": [lora()],
    "several": [lora(), lora(r=2, use_rslora=True), lora(r=3)],
    "gate and up only": [lora(parameters=EXPERTS[:1])],
    "down only": [lora(parameters=EXPERTS[1:])],
    "rank pattern": [lora(rank_pattern={"experts.down_proj": 1}, alpha_pattern={"experts.down_proj": 3})],
    "shared experts and dense layers": [lora(parameters=MLPS), lora(r=2, parameters=MLPS)],
    "all experts": [lora(parameters=EXPERTS + MLPS)],
    "one layer": [lora(parameters=[f"layers.2.{name}" for name in EXPERTS])],
}


@pytest.mark.parametrize("family", ["v1", "v2", "v3"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_same_step_as_by_added_weights(family, name):
    assert_same_step(adapted(family, *ADAPTERS[name]), **TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = adapted("v3", lora(), lora(r=2))
    _, expected = step(model)
    model.enable_input_require_grads()  # without it the reentrant kind sees no gradient to compute
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, gradients = step(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **TOLERANCE)


def test_mtp_layers():
    assert_same_step(adapted("v3", lora(), num_nextn_predict_layers=1), **TOLERANCE)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (torch.dist(a.float(), b.float()) / b.float().norm()).item()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast):
    """Autocast over float32 weights, or weights in bfloat16 with PEFT's float32 adapters: both ways round at 2^-9, at
    different places, and lie as far from each other as from float32 (0.02 of the logits, 0.04 of the gradients)."""
    model = adapted("v1", lora())  # V1 chooses experts by softmax scores that are far enough apart for bfloat16
    exact_logits, exact_gradients = step(model)
    if not autocast:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, gradients = step(model)
        with by_peft(model):
            peft_logits, peft_gradients = step(model)
    assert gradients["base_model.model.model.layers.1.mlp.experts.lora_A.0.weight"].dtype == torch.float32
    # No further from the exact result than PEFT's way, up to chance.
    assert relative_difference(logits, exact_logits) < 1.5 * relative_difference(peft_logits, exact_logits) < 0.1
    for name, exact in exact_gradients.items():
        ours, theirs = (relative_difference(g[name], exact) for g in (gradients, peft_gradients))
        assert ours < 1.5 * theirs + 0.01 < 0.3, name


@torch.no_grad()
def test_disabled_switched_and_merged():
    model = adapted("v3", lora(), lora(r=2)).eval()
    base = small_model("v3")
    ids = random_ids(2, 17)
    both = model(ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)
    model.set_adapter("1")
    second = model(ids).logits
    with by_peft(model):
        torch.testing.assert_close(second, model(ids).logits, **TOLERANCE)
    assert (second - both).abs().max() > 0.1

    model.merge_adapter(["1"])
    torch.testing.assert_close(model(ids).logits, second, **TOLERANCE)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, second, **TOLERANCE)
    model.base_model.set_adapter(["0", "1"])
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, both, **TOLERANCE)


def test_generation_with_a_cache():
    model = adapted("v2", lora()).eval()
    prompt = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    with by_peft(model):
        assert tokens.tolist() == model.generate(**prompt, max_new_tokens=8, do_sample=False).tolist()


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation writes; views are none."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = result if isinstance(result, (tuple, list)) else [result]
            self.numel = max([self.numel, *(out.numel() for out in outputs if isinstance(out, torch.Tensor))])
        return result


@pytest.mark.parametrize("parametrized", [False, True])
def test_nothing_as_large_as_the_experts_weights_is_written(parametrized):
    """Neither the product B·A nor a gradient of the frozen weights; with PEFT's way as the check of the check."""
    model = adapted("v3", lora(r=1), n_routed_experts=64, num_experts_per_tok=2)
    weights = model.get_base_model().model.layers[1].mlp.experts.get_base_layer().down_proj.numel()
    with by_peft(model) if parametrized else contextlib.nullcontext(), LargestTensor() as largest:
        step(model)
    assert (largest.numel >= weights) == parametrized
