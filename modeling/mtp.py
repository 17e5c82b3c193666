"""Multi-Token Prediction: DeepSeek-V3 §2.2 (arXiv 2412.19437).

Shapes: B batch, T tokens, H hidden, D depth (number of MTP layers, k = 0 … D-1).

Each depth predicts one token further. Depth k takes, at every position i, the representation of the depth before
(depth 0: the main model's, after its final norm) and the embedding of token i+k+1, joins them, runs one decoder block
and predicts token i+k+2 through the main model's own output head. With tokens t0 … t5 and D = 2:

    position i      0        1        2        3        4
    main            t1       t2       t3       t4       t5        from t0 … t4
    depth 0 reads   t1       t2       t3       t4       t5
            target  t2       t3       t4       t5       -
    depth 1 reads   t2       t3       t4       t5
            target  t3       t4       t5       -

So depth k has T-1-k positions, of which the last has no target yet: that one drafts.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase

from .decoder import DecoderLayer, DecoderLayerOutput
from .projection import project


class SharedHead(nn.Module):
    """What an MTP layer keeps of an output head of its own: the norm. The projection is the main model's `lm_head`."""

    def __init__(self, config: DeepseekConfigBase):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states)


class MultiTokenPredictionLayer(DecoderLayer):
    """MTP module of one depth (eq. 21-23): `model.layers.<num_hidden_layers + k>` in the checkpoints."""

    def __init__(self, config: DeepseekConfigBase, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs) -> DecoderLayerOutput:
        """`hidden_states` [B, T', H] of the depth before, `next_embeds` [B, T', H] of each position's next token →
        the block's output after the shared head's norm, ready for `lm_head` and for the next depth."""
        # The paper writes [hnorm; enorm]; the published weights take the embedding first.
        joined = project(self.eh_proj, torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1))
        output = super().forward(joined, **kwargs)
        return output._replace(hidden_states=self.shared_head(output.hidden_states))


@torch.no_grad()
def init_mtp_from_last_layer(model: PreTrainedModel, num_layers: int) -> None:
    """Gives a language model without MTP layers `num_layers` of them, to be trained from there.

    Each begins as a copy of the last decoder layer of its kind (with a mixture of experts, where the model has one) and
    of the final norm; `eh_proj` begins as the mean of the next token's embedding and the representation.

    Raises:
        ValueError: the model has MTP layers, or `num_layers` is less than 1.
    """
    config, layers = model.config, model.get_decoder().layers
    if config.num_nextn_predict_layers or num_layers < 1:
        raise ValueError(
            f"init_mtp_from_last_layer={num_layers} for a model with {config.num_nextn_predict_layers} MTP layers "
            "(`num_nextn_predict_layers`); accepted: at least 1, for a model without."
        )
    first = config.num_hidden_layers
    kind = config.is_moe_layer(first)
    last = next(layers[index] for index in reversed(range(first)) if config.is_moe_layer(index) == kind)
    reference = next(last.parameters())
    for depth in range(num_layers):
        layer = MultiTokenPredictionLayer(config, first + depth).to(reference.device, reference.dtype)
        layer.load_state_dict(last.state_dict(), strict=False)  # what an MTP layer has besides is set below
        for norm in (layer.enorm, layer.hnorm):
            norm.weight.fill_(1.0)
        layer.shared_head.norm.load_state_dict(model.get_decoder().norm.state_dict())
        half = torch.eye(config.hidden_size, dtype=reference.dtype, device=reference.device) / 2
        layer.eh_proj.weight.copy_(torch.cat([half, half], dim=1))
        layers.append(layer.train(model.training))
    config.num_nextn_predict_layers = num_layers


def within_document(
    reach: int, token_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """[B or 1, T-reach], True where the tokens i … i+reach are all real and of one document; `None` where nothing tells
    padding or documents apart. A packed row's documents begin where `position_ids` do not go on counting.

    Args:
        token_mask: [B, T], True for real tokens.
        position_ids: [B, T] or [1, T].
    """
    if token_mask is None and position_ids is None:
        return None
    breaks = torch.tensor(False)  # [B or 1, T-1]: whether token i+1 does not continue token i
    if token_mask is not None:
        breaks = token_mask[:, 1:] != token_mask[:, :-1]
    if position_ids is not None:
        breaks = breaks.to(position_ids.device) | (position_ids.diff(dim=-1) != 1)
    document = breaks.cumsum(dim=-1)
    document = nn.functional.pad(document, (1, 0))
    within = document[:, :-reach] == document[:, reach:]
    return within if token_mask is None else within & token_mask[:, reach:].to(within.device)


def mtp_labels(
    labels: torch.Tensor, depth: int, token_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Targets of depth k: [B, T-1-k], entry i holding label i+k+2, or -100 where there is nothing to learn.

    That is at the end of the row, on padding, and wherever the tokens i … i+k+2 do not all belong to one document.

    Args:
        labels: [B, T], -100 where ignored.
        token_mask: [B, T], True for real tokens.
        position_ids: [B, T] or [1, T].
    """
    reach = depth + 2
    targets = labels[:, reach:]
    within = within_document(reach, token_mask, position_ids)
    if within is not None:
        targets = targets.masked_fill(~within.to(labels.device), -100)
    return nn.functional.pad(targets, (0, 1), value=-100)
