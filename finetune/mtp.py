"""Training the Multi-Token Prediction layers (DeepSeek-V3 §2.2): the weight of their loss, and training them alone."""

from collections.abc import Sequence

from transformers import PreTrainedModel, TrainerCallback

from .router_bias import unwrap


def freeze_all_but_mtp(model: PreTrainedModel) -> None:
    """Leaves the MTP layers as all there is to train: a draft head is fitted to a model that stays as it is.

    Embedding and output head are the main model's and stay too.

    Raises:
        ValueError: the model has no MTP layer.
    """
    if not len(model.mtp_layers):
        raise ValueError(
            "train_mtp_only=True for a model without MTP layers (`num_nextn_predict_layers` is 0); accepted: a "
            "checkpoint that holds them, or init_mtp_from_last_layer with the number to make."
        )
    model.requires_grad_(False)
    model.mtp_layers.requires_grad_(True)


class MtpLossWeightCallback(TrainerCallback):
    """Sets the model's `mtp_loss_weight` over the run.

    Args:
        weights: each holds for an equal share of the steps. `[0.3]` is a constant; `[0.3, 0.3, 0.1]` is about
            DeepSeek-V3's pre-training (§4.2: 0.3 for the first 10 of 14.8 trillion tokens, then 0.1).

    Raises:
        ValueError: a weight is negative, or the model has no MTP layer to weigh when training begins.
    """

    def __init__(self, weights: Sequence[float]):
        if not weights or min(weights) < 0:
            raise ValueError(f"mtp_loss_weight={list(weights)}; accepted: one or more weights of at least 0.")
        self.weights = list(weights)

    def on_train_begin(self, args, state, control, model, **kwargs):
        if not unwrap(model).config.num_nextn_predict_layers:
            raise ValueError(
                f"mtp_loss_weight={self.weights} for a model without MTP layers (`num_nextn_predict_layers` is 0); "
                "accepted: none."
            )

    def on_step_begin(self, args, state, control, model, **kwargs):
        share = state.global_step * len(self.weights) // state.max_steps
        unwrap(model).config.mtp_loss_weight = self.weights[min(share, len(self.weights) - 1)]
