"""Transformers' shared model tests on our three families: what its own `DeepseekV3ForCausalLM` passes, ours pass."""

import os
import unittest

import pytest
from transformers_suite import SuiteUnavailable

from deepseek_hf.configuration import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from deepseek_hf.modeling import (
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekModel,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
)

try:
    from transformers_common_cases import FLOAT32_BIAS_TESTS, V1_SIZES, V2_SIZES, V3_SIZES, CommonModelCase
except SuiteUnavailable as unavailable:
    if "CI" in os.environ:  # there the package index is in reach, and a skip would hide that these tests are gone
        raise
    pytest.skip(str(unavailable), allow_module_level=True)


class DeepseekCommonTest(CommonModelCase, unittest.TestCase):
    config_class = DeepseekConfig
    all_model_classes = (DeepseekModel, DeepseekForCausalLM, DeepseekForSequenceClassification)
    sizes = V1_SIZES
    excluded = FLOAT32_BIAS_TESTS


class DeepseekV2CommonTest(CommonModelCase, unittest.TestCase):
    config_class = DeepseekV2Config
    all_model_classes = (DeepseekV2Model, DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification)
    sizes = V2_SIZES
    excluded = FLOAT32_BIAS_TESTS


class DeepseekV3CommonTest(CommonModelCase, unittest.TestCase):
    """With one Multi-Token Prediction layer, which is to be loaded, trained, saved and split like the others."""

    config_class = DeepseekV3Config
    all_model_classes = (DeepseekV3Model, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification)
    sizes = V3_SIZES | {"num_nextn_predict_layers": 1}
