"""The DeepSeek models: one implementation behind the names `Deepseek{,V2,V3}{Model,ForCausalLM,…}`.

Shapes: B batch, T tokens, S tokens with the cached ones, H hidden, W vocabulary, E routed experts, K experts a token,
D MTP layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import ModelOutput, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from deepseek_hf.configuration import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase

from .attention import MultiHeadAttention, MultiHeadLatentAttention
from .balance import Routing, balance_loss
from .causal_mask import causal_mask
from .checkpoint import CheckpointMixin
from .decoder import DecoderLayer
from .experts import MixtureOfExperts, RoutedExperts
from .latent_cache import use_latent_layers
from .mtp import MultiTokenPredictionLayer, mtp_labels, within_document
from .projection import project
from .rotary import RotaryEmbedding
from .router import Router
from .speculative import SpeculativeDecoding
from .token_loss import chunked_cross_entropy


@dataclass
class DeepseekModelOutput(MoeModelOutputWithPast):
    """transformers' `MoeModelOutputWithPast`, and on request (`output_routing=True`) the `routing` of each mixture of
    experts, for the balance losses."""

    routing: tuple[Routing, ...] | None = None


@dataclass
class DeepseekCausalLMOutput(ModelOutput):
    """Output of the causal language models.

    - `loss`: scalar, given labels. In training mode cross-entropy + `mtp_loss_weight`·`mtp_loss` + `aux_loss`; in
      evaluation mode the cross-entropy alone.
    - `logits`: [B, T, W] (or the positions that `logits_to_keep` asks for); `None` with `output_logits=False`.
    - `past_key_values`: the cache.
    - `hidden_states`, `attentions`, `router_logits`: tuples over layers, on request; `router_logits` are [B·T, E].
    - `aux_loss`: scalar, given labels: the balance losses summed over layers (DeepSeek-V2 §2.1.3).
    - `mtp_loss`: scalar, given labels: cross-entropy of the MTP layers, averaged over depths (DeepSeek-V3 eq. 24-25);
      `mtp_losses`: a tuple of the D of them.
    - `mtp_logits`: with `output_mtp_logits=True`, one [B, T-1-k, W] a depth k; entry i predicts token i+k+2.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    mtp_losses: tuple[torch.Tensor, ...] | None = None
    mtp_logits: tuple[torch.Tensor, ...] | None = None


class MultiTokenPrediction(NamedTuple):
    """What a run of the MTP layers gives: their losses (a scalar each), their logits and their routing."""

    losses: tuple[torch.Tensor, ...] = ()
    logits: tuple[torch.Tensor, ...] | None = None
    routing: tuple[Routing, ...] = ()


class DeepseekPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """What all DeepSeek models declare to transformers: capabilities, initialisation, checkpoints, router balance."""

    config: DeepseekConfigBase
    config_class = DeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "MultiTokenPredictionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DecoderLayer,
        "attentions": [MultiHeadAttention, MultiHeadLatentAttention],
        "router_logits": OutputRecorder(Router, index=0),
    }
    # The bias moves by steps of 0.001 around values of about 1, which bfloat16 cannot represent.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers (read in 5.23) looks for `@use_experts_implementation` in this file; it is in experts.py.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """transformers' check of `experts_implementation`, with the default of `experts.py`."""
        return super().get_correct_experts_implementation(requested_experts or "per_device")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            if self.config.topk_method == "noaux_tc":
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, RoutedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)

    def collect_expert_load(self) -> dict[int, torch.Tensor]:
        """How many tokens each routed expert got in training forwards since the last call: layer index → [E], int64.

        Padding is not counted. Summed over all ranks where a process group exists; the counts start anew.
        """
        loads = {}
        for layer_idx, layer in enumerate(self.get_decoder().layers):
            if isinstance(layer.mlp, MixtureOfExperts) and layer.mlp.router.expert_load is not None:
                loads[layer_idx], layer.mlp.router.expert_load = layer.mlp.router.expert_load, None
        if loads and torch.distributed.is_available() and torch.distributed.is_initialized():
            for load in loads.values():
                torch.distributed.all_reduce(load)
        return loads

    def update_router_bias(self, speed: float) -> dict[int, torch.Tensor]:
        """One step of auxiliary-loss-free balancing (DeepSeek-V3 §2.1.2, arXiv 2408.15664): call it after each
        optimizer step. Moves every router's bias by ±`speed` (in units of the routing score; DeepSeek-V3 trains with
        0.001) towards the experts with less than the mean load.

        Returns the loads that decided it, as `collect_expert_load` does. Raises `ValueError` where the routing has no
        bias.
        """
        if self.config.topk_method != "noaux_tc":
            raise ValueError(
                f"`topk_method` is {self.config.topk_method!r}; accepted: 'noaux_tc', the routing that has a bias. "
                "Balance this model by its auxiliary losses."
            )
        loads = self.collect_expert_load()
        layers = self.get_decoder().layers
        for layer_idx, load in loads.items():
            router = layers[layer_idx].mlp.router
            if router.weight.requires_grad:  # a frozen router keeps its bias too
                router.update_bias(load, speed)
        return loads


class DeepseekModel(DeepseekPreTrainedModel):
    """The backbone: embedding, `num_hidden_layers` decoder layers, final norm."""

    def __init__(self, config: DeepseekConfigBase):
        super().__init__(config)
        config.validate_architecture()  # fields may have been set after construction
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        **kwargs,
    ) -> DeepseekModelOutput:
        """`input_ids` [B, T] or `inputs_embeds` [B, T, H]; `attention_mask` [B, S] (1 for real tokens) or a prepared
        4-D mask; `position_ids` [B, T], restarting at 0 where a packed row begins a new document."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        position_ids, shared = self.layer_inputs(inputs_embeds, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and hasattr(self.config, "kv_lora_rank"):
            past_key_values = use_latent_layers(past_key_values)

        hidden_states = inputs_embeds
        routing = []
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states, router_logits, topk_index = layer(
                hidden_states,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **shared,
                **kwargs,
            )
            self.record_routing(layer, router_logits, topk_index, shared["token_mask"], routing)
        return DeepseekModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            routing=tuple(routing) if output_routing else None,
        )

    def layer_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        layer_idx: int | None = None,
    ) -> tuple[torch.Tensor, dict]:
        """What all layers share: `position_ids` [B or 1, T], and as a dict `position_embeddings`, the prepared
        `attention_mask`, and `token_mask` [B, T] (`None` unless `attention_mask` tells padding). `layer_idx`: a layer
        whose cache has another length than the first's."""
        T = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)
        return position_ids, {
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "attention_mask": causal_mask(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, layer_idx
            ),
            "token_mask": padding_mask(attention_mask, T),
        }

    def record_routing(
        self,
        layer: DecoderLayer,
        router_logits: torch.Tensor | None,
        topk_index: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        routing: list[Routing],
    ) -> None:
        """Appends the layer's routing to `routing`, and in training counts the load of its experts."""
        if topk_index is None:
            return
        routing.append(Routing(router_logits, topk_index, token_mask))
        if self.training:
            layer.mlp.router.count_load(topk_index, None if token_mask is None else token_mask.flatten())


def padding_mask(attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """[B, T], True for real tokens, of a 2-D `attention_mask` [B, S]; `None` where there is none or it is 4-D."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_tokens:].bool()


def first_tokens_of_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """An attention mask, [B, T] or [B, 1, T, T], of the first `length` tokens."""
    if attention_mask is None:
        return None
    return attention_mask[:, :length] if attention_mask.dim() == 2 else attention_mask[..., :length, :length]


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """The language model: backbone, output head, and `num_nextn_predict_layers` MTP layers at the end of
    `model.layers`.

    `generate(use_mtp=True)` lets the MTP layers draft: the same tokens in fewer forwards of the main model, see
    `speculative.py`. `num_draft_tokens` says how many a round, by default one an MTP layer; beyond that the last layer
    is applied repeatedly. With `return_dict_in_generate=True` the output has `statistics` of it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    backbone_class: type[DeepseekModel] = DeepseekModel

    def __init__(self, config: DeepseekConfigBase):
        super().__init__(config)
        self.model = self.backbone_class(config)
        first = config.num_hidden_layers
        self.model.layers.extend(
            MultiTokenPredictionLayer(config, first + depth) for depth in range(config.num_nextn_predict_layers)
        )
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def mtp_layers(self) -> nn.ModuleList:
        """The D MTP layers, in order of depth."""
        return self.model.layers[self.config.num_hidden_layers :]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_mtp_logits: bool = False,
        output_logits: bool = True,
        **kwargs,
    ) -> DeepseekCausalLMOutput:
        """As `DeepseekModel.forward`; see `DeepseekCausalLMOutput` for what comes back.

        Args:
            labels: [B, T], the input tokens, -100 where no loss is wanted. The shift to the next token is done here.
            output_logits: `False`, with `labels`, gives the loss alone: the logits of all T positions never exist
                together (see `token_loss.py`). The MTP layers' never do, unless `output_mtp_logits` asks for them.
            num_items_in_batch: as the Trainer passes it when it accumulates gradients: all losses then are sums over
                this micro-batch divided by the number of targets of the whole batch, so that micro-batches add up to
                the gradient of one batch.
        """
        if use_cache is None and labels is not None:
            use_cache = False  # a loss needs no cache, and a cache would hide the packed rows' document boundaries
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=labels is not None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None and not output_logits:
            raise ValueError("`output_logits` is False and there are no `labels`; accepted: one or the other.")
        logits = project(self.lm_head, hidden_states[:, kept, :]) if output_logits else None

        mtp = MultiTokenPrediction()
        wants_mtp_loss = labels is not None and not (self.training and self.config.mtp_loss_weight == 0)
        if len(self.mtp_layers) and (output_mtp_logits or wants_mtp_loss):
            if past_key_values is not None and past_key_values.get_seq_length() > hidden_states.shape[1]:
                raise ValueError(
                    "`past_key_values` holds earlier tokens; accepted with `labels` or `output_mtp_logits`: whole "
                    "sequences, as the MTP layers have not seen what the cache stands for."
                )
            if inputs_embeds is None:
                inputs_embeds = self.model.embed_tokens(input_ids)
            mtp = self.predict_further_tokens(
                hidden_states,
                inputs_embeds,
                attention_mask,
                position_ids,
                labels=labels if wants_mtp_loss else None,
                output_mtp_logits=output_mtp_logits,
                **kwargs,
            )

        loss = aux_loss = mtp_loss = None
        if labels is not None:
            if output_logits:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            else:
                targets, num_items = labels[:, 1:], kwargs.get("num_items_in_batch")
                loss = chunked_cross_entropy(hidden_states[:, :-1], self.lm_head, targets, num_items)
            aux_loss = self.sum_balance_losses(
                (*outputs.routing, *mtp.routing), labels, kwargs.get("num_items_in_batch")
            )
            if self.training and aux_loss is not None:
                loss = loss + aux_loss.to(loss.device)
            if mtp.losses:
                mtp_loss = torch.stack(mtp.losses).mean()
                if self.training:
                    loss = loss + self.config.mtp_loss_weight * mtp_loss.to(loss.device)
        return DeepseekCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            aux_loss=aux_loss,
            mtp_loss=mtp_loss,
            mtp_losses=mtp.losses or None,
            mtp_logits=mtp.logits,
        )

    # The next two are where `generate` (read in transformers 5.23) settles its settings and starts to decode. The
    # public hook for another way of decoding, `custom_generate`, loses the streamer and the tokenizer of stop strings.

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, num_draft_tokens: int | None = None, **kwargs
    ) -> tuple[GenerationConfig, dict]:
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if num_draft_tokens is not None:
            if not generation_config.use_mtp:
                raise ValueError(f"`num_draft_tokens` is {num_draft_tokens} and `use_mtp` is not set; accepted: both.")
            generation_config.num_draft_tokens = num_draft_tokens
        return generation_config, model_kwargs

    def _assisted_decoding(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        inputs_tensor: torch.Tensor | None = None,
        **kwargs,
    ):
        if not generation_config.use_mtp:
            return super()._assisted_decoding(
                input_ids, logits_processor, stopping_criteria, generation_config, inputs_tensor=inputs_tensor, **kwargs
            )
        streamer = kwargs.pop("streamer", None)
        return SpeculativeDecoding(
            self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, kwargs
        ).run()

    def predict_further_tokens(
        self,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        output_mtp_logits: bool,
        **kwargs,
    ) -> MultiTokenPrediction:
        """Runs the MTP layers, teacher-forced, on the main model's normed `hidden_states` [B, T, H]; see `mtp.py`."""
        num_tokens = hidden_states.shape[1]
        token_mask = padding_mask(attention_mask, num_tokens)
        losses, logits, routing = [], [], []
        for depth, layer in enumerate(self.mtp_layers):
            length = num_tokens - 1 - depth
            if length < 1:
                raise ValueError(
                    f"`input_ids` has {num_tokens} tokens a row; accepted: at least {depth + 2}, as MTP depth "
                    f"{depth} looks that far ahead."
                )
            positions, shared = self.model.layer_inputs(
                inputs_embeds[:, :length],
                first_tokens_of_mask(attention_mask, length),
                None if position_ids is None else position_ids[:, :length],
                past_key_values=None,
            )
            # A position counts as a token where the tokens i … i+k+1 that it reads are one document's.
            within = within_document(depth + 1, token_mask, position_ids)
            shared["token_mask"] = None if within is None else within.expand(inputs_embeds.shape[0], -1)
            hidden_states, router_logits, topk_index = layer(
                hidden_states[:, :length],
                inputs_embeds[:, depth + 1 :],
                position_ids=positions,
                **shared,
                **kwargs,
            )
            self.model.record_routing(layer, router_logits, topk_index, shared["token_mask"], routing)
            if output_mtp_logits:
                logits.append(project(self.lm_head, hidden_states))
            if labels is not None:
                targets = mtp_labels(labels, depth, token_mask, position_ids)
                num_items = kwargs.get("num_items_in_batch")
                losses.append(chunked_cross_entropy(hidden_states, self.lm_head, targets, num_items))
        return MultiTokenPrediction(
            losses=tuple(losses),
            logits=tuple(logits) if output_mtp_logits else None,
            routing=tuple(routing),
        )

    def sum_balance_losses(
        self,
        routing: tuple[Routing, ...],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor | None:
        """The balance losses of all layers, MTP layers included; `None` where the model has none to compute.

        With `num_items_in_batch` a sequence weighs as its share of the batch's targets, so that the losses of
        micro-batches add up; otherwise all sequences weigh alike.
        """
        config = self.config
        if not routing or not (config.aux_loss_alpha or config.device_aux_loss_alpha or config.comm_aux_loss_alpha):
            return None
        sequence_weight = None
        if num_items_in_batch is not None:
            sequence_weight = (labels[:, 1:] != -100).sum(dim=1) / num_items_in_batch
        losses = [balance_loss(config, layer, labels.shape[0], sequence_weight) for layer in routing]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """A linear head on the last real token of each row; the backbone without MTP layers."""


class DeepseekV2Model(DeepseekModel):
    """DeepSeek-V2's backbone (arXiv 2405.04434)."""

    config_class = DeepseekV2Config


class DeepseekV2ForCausalLM(DeepseekForCausalLM):
    """DeepSeek-V2 as a language model."""

    config_class = DeepseekV2Config
    backbone_class = DeepseekV2Model


class DeepseekV2ForSequenceClassification(DeepseekForSequenceClassification):
    """DeepSeek-V2 as a classifier."""

    config_class = DeepseekV2Config


class DeepseekV3Model(DeepseekModel):
    """DeepSeek-V3's backbone (arXiv 2412.19437)."""

    config_class = DeepseekV3Config


class DeepseekV3ForCausalLM(DeepseekForCausalLM):
    """DeepSeek-V3 as a language model."""

    config_class = DeepseekV3Config
    backbone_class = DeepseekV3Model


class DeepseekV3ForSequenceClassification(DeepseekForSequenceClassification):
    """DeepSeek-V3 as a classifier."""

    config_class = DeepseekV3Config
