"""DeepSeek-V2-Lite against transformers' own class: logits and greedy tokens of a fixed set of prompts.

The same test runs on a golden checkpoint in CI and on the published one where there is one. The tolerance is measured
where the test runs: transformers' class with one attention kernel against itself with another ("eager" and "sdpa") is
the same mathematics summed in another order, on this device and in this dtype. Ours may be `FACTOR` times as far from
it, for it differs in more sums than those of attention (experts, RoPE, norms).
"""

import gc
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as TheirConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM as TheirModel
from transformers.utils import cached_file

from deepseek_hf.modeling import DeepseekV2ForCausalLM

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "deepseek_v2_lite"
PUBLISHED = os.environ.get("DEEPSEEK_V2_LITE")
LAYERS = int(os.environ["DEEPSEEK_PARITY_LAYERS"]) if "DEEPSEEK_PARITY_LAYERS" in os.environ else None
HOW_TO_RUN = (
    "to run it: DEEPSEEK_V2_LITE=deepseek-ai/DeepSeek-V2-Lite (or a folder that holds it) pytest -m hub "
    "tests/modeling/test_hub_parity.py. 31 GB are downloaded; a GPU needs as much memory, a CPU twice (float32). "
    "DEEPSEEK_PARITY_LAYERS=3 beside it runs the first 3 of 27 layers, in 9 GB of memory on a CPU."
)
FACTOR = 3
# What rounding may cost at most, as a share of the logits' size: their 24 and 8 bits of mantissa, a few hundred times
# over (layers, and experts that change where two scores nearly tie). A measured tolerance above it would prove nothing.
LARGEST_SHARE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
TEXTS = [
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "混合专家模型的每一层由许多专家组成，路由器",
    "In 1905, Albert Einstein published four papers that changed physics. The first one, on the photoelectric effect, "
    "argued that light is made of quanta. The second explained Brownian motion. The third introduced special "
    "relativity, and the fourth",
]
NEW_TOKENS = 16


class Answers(NamedTuple):
    """What a model says to each prompt: the prompt's logits [T, W], the greedy tokens and the logits they came from."""

    dtype: torch.dtype
    logits: list[torch.Tensor]
    tokens: list[torch.Tensor]
    token_logits: list[torch.Tensor]


def prompts(checkpoint) -> list[torch.Tensor]:
    """[1, T] each, by the checkpoint's tokenizer; the golden checkpoint has none and gets fixed ids."""
    if cached_file(checkpoint, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        return [torch.arange(start, start + length)[None] * 37 % 320 for start, length in ((2, 7), (90, 40), (5, 90))]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]


@torch.no_grad()
def answers(model, all_input_ids: list[torch.Tensor], attn_implementation: str) -> Answers:
    model.set_attn_implementation(attn_implementation)
    result = Answers(model.dtype, [], [], [])
    for input_ids in all_input_ids:
        input_ids = input_ids.to(model.device)
        result.logits.append(model(input_ids).logits[0].float().cpu())
        generated = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        result.tokens.append(generated.sequences[0, input_ids.shape[1] :].cpu())
        result.token_logits.append(torch.cat(generated.logits).float().cpu())
    return result


def ask(model_class, checkpoint, config_class, layers: int | None, attn_implementations: list[str]) -> list[Answers]:
    """Answers with each attention kernel. The model is gone afterwards, so that the next one finds room."""
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    config = config_class.from_pretrained(checkpoint)
    if layers is not None:
        config.num_hidden_layers = layers
    model = model_class.from_pretrained(checkpoint, config=config, dtype=dtype, device_map=device)
    result = [answers(model, prompts(checkpoint), kernel) for kernel in attn_implementations]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return result


@pytest.mark.parametrize(
    ("checkpoint", "layers"),
    [
        pytest.param(GOLDEN, None, id="golden"),
        pytest.param(GOLDEN, 2, id="golden, two layers"),
        pytest.param(
            PUBLISHED,
            LAYERS,
            id="DeepSeek-V2-Lite",
            marks=[pytest.mark.hub, pytest.mark.skipif(PUBLISHED is None, reason=HOW_TO_RUN)],
        ),
    ],
)
def test_logits_and_greedy_tokens(checkpoint, layers):
    theirs, theirs_eager = ask(TheirModel, checkpoint, TheirConfig, layers, ["sdpa", "eager"])
    (ours,) = ask(DeepseekV2ForCausalLM, checkpoint, DeepseekV2ForCausalLM.config_class, layers, ["sdpa"])
    assert ours.dtype == theirs.dtype
    for prompt in range(len(theirs.logits)):
        expected = theirs.logits[prompt]
        noise = (theirs_eager.logits[prompt] - expected).norm()
        assert 0 < noise < LARGEST_SHARE[theirs.dtype] * expected.norm()
        assert (ours.logits[prompt] - expected).norm() < FACTOR * noise

        # Greedy tokens are the same, or part where the two best lie within the tolerance.
        differing = (ours.tokens[prompt] != theirs.tokens[prompt]).nonzero()
        if len(differing):
            step = differing[0].item()
            of_token = theirs.token_logits[prompt][step]
            gap = of_token.max() - of_token[ours.tokens[prompt][step]]
            largest_noise = (theirs_eager.logits[prompt] - expected).abs().max()
            assert gap <= 2 * FACTOR * largest_noise, f"{ours.tokens[prompt]} and {theirs.tokens[prompt]}"
