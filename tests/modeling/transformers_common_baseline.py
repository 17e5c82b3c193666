"""The baseline: what transformers' own DeepSeek classes pass of `test_transformers_common.py`'s tests.

Not collected by default, since it tests transformers and not this project. To compare the two:

    pytest -rA tests/modeling/transformers_common_baseline.py
"""

import unittest

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
)
from transformers_common_cases import V2_SIZES, V3_SIZES, CommonModelCase


class DeepseekV2Baseline(CommonModelCase, unittest.TestCase):
    config_class = DeepseekV2Config
    all_model_classes = (DeepseekV2Model, DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification)
    sizes = V2_SIZES


class DeepseekV3Baseline(CommonModelCase, unittest.TestCase):
    config_class = DeepseekV3Config
    all_model_classes = (DeepseekV3Model, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification)
    sizes = V3_SIZES
