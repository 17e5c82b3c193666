"""How much each routed expert has to do with a task: the scores of Expert-Specialized Fine-Tuning (arXiv 2407.01906).

Shapes: B rows, T tokens, N = B·T, E routed experts, K experts a token.

Over a sample of the task's data, an expert's token score is the share of the tokens' choices that fell on it (eq. 7),
its gate score the share of the gates' weights (eq. 6). Both are kept as sums, so that batches and ranks add up.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from accelerate.utils import reduce
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_hf.modeling.experts import MixtureOfExperts

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ScoreFunction = Literal["token", "gate"]


class ExpertScores:
    """Sums over a sample: `sums["token"]` and `sums["gate"]`, layer index → [E] float64; `num_tokens` counts tokens."""

    def __init__(self, num_experts: dict[int, int]):
        self.num_tokens = 0
        self.sums: dict[str, dict[int, torch.Tensor]] = {
            function: {layer: torch.zeros(count, dtype=torch.float64) for layer, count in num_experts.items()}
            for function in ("token", "gate")
        }

    def add(self, layer: int, topk_weight: torch.Tensor, topk_index: torch.Tensor) -> None:
        """Counts one layer's routing of N tokens, both [N, K]."""
        index = topk_index.flatten().cpu()
        self.sums["token"][layer] += torch.bincount(index, minlength=len(self.sums["token"][layer]))
        self.sums["gate"][layer].index_add_(0, index, topk_weight.flatten().cpu().double())

    def merge(self, other: "ExpertScores") -> None:
        """Adds what another part of the sample gave."""
        self.num_tokens += other.num_tokens
        for function, layers in other.sums.items():
            for layer, values in layers.items():
                self.sums[function][layer] += values

    def merge_ranks(self) -> None:
        """Adds what the other processes counted, where there are any."""
        self.num_tokens = int(reduce(torch.tensor(self.num_tokens), "sum"))
        self.sums = {
            function: {layer: reduce(values, "sum") for layer, values in layers.items()}
            for function, layers in self.sums.items()
        }

    def shares(self, function: ScoreFunction) -> dict[int, torch.Tensor]:
        """The scores: layer index → [E], summing to 1 in every layer."""
        return {layer: values / values.sum() for layer, values in self.sums[function].items()}

    def choose(self, function: ScoreFunction, top_p: float) -> dict[int, list[int]]:
        """The fewest experts of every layer whose scores add up to `top_p` (eq. 8), the highest first.

        Raises `ValueError` for a `top_p` outside (0, 1].
        """
        if not 0 < top_p <= 1:
            raise ValueError(f"esft_top_p={top_p}; accepted: above 0, up to 1.")
        chosen = {}
        for layer, shares in self.shares(function).items():
            order = shares.argsort(descending=True, stable=True)
            # Shares of exactly top_p are not to be missed by rounding.
            enough = shares[order].cumsum(0) >= top_p - 1e-12
            chosen[layer] = order[: int((~enough).sum()) + 1].tolist()
        return chosen

    def write(self, path: Path) -> None:
        """As JSON: `{"token_scores": {"1": {"0": 0.0103, …}, …}, "gate_scores": …}`, the published form."""
        scores = {
            f"{function}_scores": {
                str(layer): {str(expert): round(share, 4) for expert, share in enumerate(shares.tolist())}
                for layer, shares in self.shares(function).items()
            }
            for function in self.sums
        }
        path.write_text(json.dumps(scores))

    def save_heat_map(self, path: Path, function: ScoreFunction, chosen: dict[int, list[int]]) -> None:
        """Draws the scores, a row a layer and a column an expert; a dot marks the chosen ones."""
        shares = self.shares(function)
        layers = sorted(shares)
        values = torch.stack([shares[layer] for layer in layers])
        width = min(3 + 0.25 * values.shape[1], 24)
        figure, axes = plt.subplots(figsize=(width, 1.5 + 0.25 * len(layers)), layout="constrained")
        image = axes.imshow(100 * values, aspect="auto", cmap="viridis", vmin=0)
        dots = [(expert, row) for row, layer in enumerate(layers) for expert in chosen.get(layer, [])]
        axes.scatter(*zip(*dots, strict=True), color="white", s=12)
        title = f"{function} scores over {self.num_tokens:,} tokens; dots: trained"
        axes.set(xlabel="expert", ylabel="layer", title=title)
        axes.set_yticks(range(len(layers)), layers)
        figure.colorbar(image, label="% of the layer")
        figure.savefig(path, dpi=120)
        plt.close(figure)


@torch.no_grad()
def collect_expert_scores(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], max_tokens: int
) -> ExpertScores:
    """Runs `model` once over `batches` until `max_tokens` tokens are counted, keeping nothing but the sums.

    Args:
        batches: with `input_ids` [B, T] and, where rows are padded, `attention_mask` [B, T].

    Raises:
        ValueError: the model has no routed experts.
    """
    mixtures = {
        index: layer.mlp
        for index, layer in enumerate(model.model.layers[: model.config.num_hidden_layers])
        if isinstance(layer.mlp, MixtureOfExperts)
    }
    if not mixtures:
        raise ValueError(
            "The model has no routed experts to score (n_routed_experts is None, or all layers are dense)."
        )
    scores = ExpertScores({index: mlp.router.num_experts for index, mlp in mixtures.items()})
    is_token = None  # [N], of the batch that is running

    def count(layer: int):
        def hook(router: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
            _, topk_weight, topk_index = output
            scores.add(layer, topk_weight[is_token], topk_index[is_token])

        return hook

    hooks = [mlp.router.register_forward_hook(count(index)) for index, mlp in mixtures.items()]
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=max_tokens, unit="token", desc="Scoring experts") as progress:
            for batch in batches:
                inputs = {
                    name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch
                }
                is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten().bool()
                model.model(**inputs, use_cache=False)
                scores.num_tokens += int(is_token.sum())
                progress.update(int(is_token.sum()))
                if scores.num_tokens >= max_tokens:
                    break
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return scores
