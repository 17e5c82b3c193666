"""How well both heads of a DeepSeek model with one MTP layer predict held-out rows, and how busy its experts are."""

import torch
import torch.nn.functional as F

ROWS_PER_BATCH = 8


@torch.no_grad()
def measure(model, rows: list[dict[str, list[int]]]) -> dict[str, float]:
    """Losses (nats a token) and top-1 accuracies over `rows` of equal length T, see `pretrain_tiny.pack`.

    - `loss`, `accuracy`: the main head, which sees the tokens up to i and predicts token i+1.
    - `mtp_loss`, `mtp_accuracy`: the MTP head, which sees the main model's state at i and token i+1, and predicts
      token i+2.
    - `mtp_agreement`: the share of positions where the MTP head's first choice is the main head's for that same token.
      Greedy speculative decoding accepts a draft exactly then.
    - `max_vio_<layer>`: the busiest expert's load above the mean, `max / mean - 1` (arXiv 2408.15664).
    """
    was_training = model.training
    model.eval()
    sums = dict.fromkeys(("loss", "accuracy", "mtp_loss", "mtp_accuracy", "mtp_agreement"), 0.0)
    main_tokens = mtp_tokens = 0
    with ExpertLoads(model) as loads:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            batch = rows[start : start + ROWS_PER_BATCH]
            inputs = {key: torch.tensor([row[key] for row in batch], device=model.device) for key in batch[0]}
            labels = inputs.pop("labels")
            # `labels` also makes the model run its MTP layer.
            output = model(**inputs, labels=labels, output_mtp_logits=True, use_cache=False)
            main, mtp = output.logits.float(), output.mtp_logits[0].float()

            # -100 marks a document's first token, which nothing before it can foretell.
            known = labels[:, 1:] != -100
            main_sums = _loss_and_hits(main[:, :-1][known], labels[:, 1:][known])
            # Token i+2 is fair to ask for if tokens i+1 and i+2 both continue the document of token i.
            known = (labels[:, 1:-1] != -100) & (labels[:, 2:] != -100)
            mtp = mtp[:, : labels.shape[1] - 2][known]
            mtp_sums = _loss_and_hits(mtp, labels[:, 2:][known])
            agreed = (mtp.argmax(-1) == main[:, 1:-1][known].argmax(-1)).sum().item()

            for key, value in zip(sums, (*main_sums, *mtp_sums, agreed), strict=True):
                sums[key] += value
            main_tokens += int((labels[:, 1:] != -100).sum())
            mtp_tokens += int(known.sum())
    model.train(was_training)
    metrics = {key: value / (mtp_tokens if key.startswith("mtp") else main_tokens) for key, value in sums.items()}
    return metrics | {f"max_vio_{layer}": vio for layer, vio in loads.max_violations().items()}


def _loss_and_hits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Sums over `logits` [N, V] and `targets` [N]: the cross-entropy, and how often the first choice is right."""
    return (
        F.cross_entropy(logits, targets, reduction="sum").item(),
        (logits.argmax(-1) == targets).sum().item(),
    )


class ExpertLoads:
    """Counts, while entered, the tokens each expert receives: `loads[layer]` is a [n_routed_experts] LongTensor."""

    def __init__(self, model):
        self.gates = {
            int(name.split(".layers.")[1].split(".")[0]): module
            for name, module in model.named_modules()
            if name.endswith("mlp.gate")
        }
        self.loads: dict[int, torch.Tensor] = {}

    def __enter__(self):
        self._hooks = [gate.register_forward_hook(self._counter(layer)) for layer, gate in self.gates.items()]
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()

    def _counter(self, layer: int):
        def count(gate, inputs, output):
            router_logits, _, topk_index = output
            counts = torch.bincount(topk_index.flatten(), minlength=router_logits.shape[-1])
            self.loads[layer] = self.loads.get(layer, 0) + counts

        return count

    def max_violations(self) -> dict[int, float]:
        return {layer: (load.max() / load.float().mean() - 1).item() for layer, load in sorted(self.loads.items())}
