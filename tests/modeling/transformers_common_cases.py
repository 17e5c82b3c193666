"""One test case class for every model family: transformers' shared model tests on a tiny configuration.

`test_transformers_common.py` runs it on our classes, `transformers_common_baseline.py` on transformers' own.
"""

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
    """Transformers' shared model tests; a subclass names the family and is a `unittest.TestCase`."""

    config_class = None
    all_model_classes = ()
    sizes: dict = {}  # noqa: RUF012 (read only)
    model_tester = None
    model_split_percents = [0.5, 0.7, 0.8]  # noqa: RUF012 (read only)

    def setUp(self):
        self.model_tester = TinyModelTester(self.config_class, self.all_model_classes, self.sizes)
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=32)

    @property
    def _torch_compile_train_cls(self):
        return self.model_tester.causal_lm_class

    def test_config(self):
        self.config_tester.run_common_tests()
