"""A picture of a training run."""

from matplotlib.figure import Figure


def save_loss_curve(log_history: list[dict[str, float]], path: str) -> None:
    """Draws the training loss and the held-out loss (nats a token) over the steps, as the Trainer logged them.

    Args:
        log_history: `trainer.state.log_history`.
        path: of the PNG file.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training (with MTP and balance losses)", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
