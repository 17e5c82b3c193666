"""DeepSeek's architecture as transformers models. Importing this package registers the model types `deepseek`,
`deepseek_v2` and `deepseek_v3` with transformers' Auto classes, in place of transformers' own classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from deepseek_hf.configuration import DeepseekConfig, DeepseekV2Config, DeepseekV3Config

from .checkpoint import register_checkpoint_layout
from .modeling_deepseek import (
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekModel,
    DeepseekPreTrainedModel,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
)

for _config, _model, _causal_lm, _classifier in (
    (DeepseekConfig, DeepseekModel, DeepseekForCausalLM, DeepseekForSequenceClassification),
    (DeepseekV2Config, DeepseekV2Model, DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification),
    (DeepseekV3Config, DeepseekV3Model, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)
    register_checkpoint_layout(_config.model_type)

__all__ = [
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekModel",
    "DeepseekPreTrainedModel",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2Model",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3Model",
]
