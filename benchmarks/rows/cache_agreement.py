"""How far an 8-bit cache moves what the tiny pretrained model says of code that it has not seen."""

from collections.abc import Iterator

import torch
from results import Result, Setup
from tiny import held_out_beginnings, tiny_model
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from deepseek_hf.modeling.quantized_cache import QuantizedLatentCache

FILES, PROMPT, DECODED = 8, 256, 256


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """[T', W] in float32, after each of the tokens behind the prompt, fed one by one."""
    model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True)
    steps = (tokens[:, t : t + 1] for t in range(PROMPT, tokens.shape[1]))
    logits = [model(step, past_key_values=cache, use_cache=True).logits[0] for step in steps]
    return torch.cat(logits).float().log_softmax(dim=-1)


def run(setup: Setup) -> Iterator[Result]:
    """Divergence from the same model's predictions with an unquantised cache: ours, and transformers' 8-bit cache."""
    model = tiny_model(setup)
    divergences, agreeing = {}, {}
    for tokens in held_out_beginnings(setup, FILES, PROMPT + DECODED):
        exact = log_probabilities(model, tokens, DynamicCache(config=model.config))
        for side, cache in (
            ("ours", QuantizedLatentCache()),
            ("theirs", QuantizedCache("fp8", config=model.config)),
        ):
            found = log_probabilities(model, tokens, cache)
            divergences.setdefault(side, []).append((exact.exp() * (exact - found)).sum(dim=-1))
            agreeing.setdefault(side, []).append((exact.argmax(dim=-1) == found.argmax(dim=-1)).float())
    ours, theirs = (torch.cat(divergences[side]).mean().item() for side in ("ours", "theirs"))
    same = {side: torch.cat(parts).mean().item() for side, parts in agreeing.items()}
    yield Result(
        row="cache-agreement",
        case=f"tiny model, {FILES} held-out files, {DECODED} tokens each",
        unit="nats of divergence",
        layers=model.config.num_hidden_layers,
        ours=ours,
        theirs=theirs,
        ratio=ours / theirs,
        note=f"the same likeliest token as with a full cache: {same['ours']:.1%}, with transformers' "
        f"`QuantizedCache('fp8')` {same['theirs']:.1%}",
    )
