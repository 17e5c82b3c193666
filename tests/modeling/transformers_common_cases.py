"""One test case class for every model family: transformers' shared model tests on a tiny configuration.

`test_transformers_common.py` runs it on our classes, `transformers_common_baseline.py` on transformers' own.
"""

import re

import torch
from transformers.testing_utils import torch_device
from transformers_suite import import_suite

common = import_suite("test_modeling_common")
tensor_parallel = import_suite("test_tensor_parallel_mixin")
expert_parallel = import_suite("test_expert_parallel_mixin")
fsdp = import_suite("test_fsdp_mixin")
training = import_suite("test_training_mixin")
ConfigTester = import_suite("test_configuration_common").ConfigTester

# The distributed tests run for a hand-picked list of model types; None is their switch for "every model".
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
expert_parallel.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

# The suite knows the role of a class by its name in these tables; transformers has no `deepseek` (V1) entry there.
common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "deepseek": "DeepseekModel"}
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {
    **common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "deepseek": "DeepseekForCausalLM",
}
common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES = {
    **common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "deepseek": "DeepseekForSequenceClassification",
}

# One dense layer, one of 8 experts; sizes divide by the two ranks of the parallel tests, the vocabulary does not.
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
MLA_SIZES = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
V1_SIZES = {**SIZES, "aux_loss_alpha": 0.001}
V2_SIZES = {
    **V1_SIZES,
    **MLA_SIZES,
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
V3_SIZES = {**SIZES, **MLA_SIZES, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}


# Not run, with the reason. What transformers' own V3 class skips on every machine is here (from a comparison with
# transformers_common_baseline.py under 5.23.0), so that any other skip of ours is a failure, see `skipTest` below.
MODALITY_TEST = re.compile("test_get_(text|image|audio|video)_features")
COMPOSITE = "for models made of sub-models with configs of their own"
MULTIMODAL = "for models with another input than text"
EXCLUDED = {
    "test_attn_implementation_composite_models": COMPOSITE,
    "test_can_set_attention_dynamically_composite_model": COMPOSITE,
    "test_flash_attn_2_can_dispatch_composite_models": COMPOSITE,
    "test_flash_attn_3_can_dispatch_composite_models": COMPOSITE,
    "test_flash_attn_4_can_dispatch_composite_models": COMPOSITE,
    "test_internal_model_config_and_subconfig_are_same": COMPOSITE,
    "test_sdpa_can_dispatch_composite_models": COMPOSITE,
    **{name: MULTIMODAL for name in dir(common.ModelTesterMixin) if MODALITY_TEST.match(name)},
    "test_vision_axial_rope": MULTIMODAL,
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": (
        "asks for `output_attentions` in the signature of `forward`; transformers' own take it among `kwargs`"
    ),
    "test_encoder_decoder_loss_no_double_shift": "for encoder-decoder models",
    "test_generation_tester_mixin_inheritance": "asks for a mixin that is not in the source distribution",
    "test_model_rope_with_partial_rotation": "no DeepSeek config has `partial_rotary_factor`",
    "test_resize_position_vector_embeddings": "for learned position embeddings",
    "test_sliding_window_mask": "for sliding-window attention",
}
# For V1 and V2: the one tensor kept in float32 whatever the model's dtype, the router's bias, is V3's.
FLOAT32_BIAS_TESTS = dict.fromkeys(("test_keep_in_fp32_modules", "test_keep_in_fp32_modules_exist"), "no router bias")
# How a test names what this machine lacks when it skips itself in its body.
MACHINE_LACKS = re.compile(r"FSDP workers|torchao|CPUs|CPU-only|not supported on")


class TinyModelTester:
    """What the suite asks of a `model_tester`: sizes, a config, and a batch of random tokens.

    The base-model, causal-LM and sequence-classification classes of one family share `config_class`.
    """

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, config_class, model_classes: tuple, sizes: dict):
        self.config_class = config_class
        self.base_model_class, self.causal_lm_class, self.sequence_classification_class = model_classes
        self.sizes = sizes
        self.num_hidden_layers = sizes["num_hidden_layers"]
        self.num_attention_heads = sizes["num_attention_heads"]
        self.hidden_size = sizes["hidden_size"]

    def get_config(self):
        return self.config_class(**self.sizes)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        attention_mask = torch.tril(torch.ones_like(input_ids)).to(torch_device)
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonModelCase(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    training.TrainingTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
    expert_parallel.ExpertParallelTesterMixin,
    fsdp.FSDPTesterMixin,
):
    """Transformers' shared model tests; a subclass names the family and is a `unittest.TestCase`.

    `excluded` adds tests that do not apply to the family, with the reason, to `EXCLUDED`.
    """

    excluded: dict = {}
    config_class = None
    all_model_classes = ()
    sizes: dict = {}
    model_tester = None
    model_split_percents = [0.5, 0.7, 0.8]

    # The suite dates a model by the copyright line of its source file and spares old ones; ours has no such line.
    test_can_init_all_missing_weights_before_2023 = True

    def __init_subclass__(cls, **kwargs):
        for name in {**EXCLUDED, **cls.excluded}:
            setattr(cls, name, None)
        super().__init_subclass__(**kwargs)

    def setUp(self):
        self.model_tester = TinyModelTester(self.config_class, self.all_model_classes, self.sizes)
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=32)

    @property
    def _torch_compile_train_cls(self):
        return self.model_tester.causal_lm_class

    def skipTest(self, reason):
        """Most of the suite's tests skip themselves where a model lacks what they ask for; here that is a failure."""
        if MACHINE_LACKS.search(reason):
            super().skipTest(reason)
        self.fail(f"skips itself, though transformers' own DeepseekV3ForCausalLM does not: {reason}")

    def test_config(self):
        self.config_tester.run_common_tests()
