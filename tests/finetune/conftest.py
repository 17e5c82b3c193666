"""A random DeepSeek-V3 model small enough to train in a second, its tokenizer, and conversations to train it on."""

from pathlib import Path

import pytest
import torch
from tiny_chat import ASSISTANT, BOS, EOS, MARKED, PAD, USER, conversation, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek_hf.configuration import DeepseekV3Config
from deepseek_hf.modeling import DeepseekV3ForCausalLM


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, USER, ASSISTANT]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [message["content"] for number in range(20) for message in conversation(number, 7)]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=MARKED,
    )


@pytest.fixture(scope="session")
def config(tokenizer) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=256,
        num_nextn_predict_layers=1,
        aux_loss_alpha=1e-2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def model(config) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


@pytest.fixture(scope="session")
def base(tmp_path_factory, config, tokenizer) -> Path:
    """The model, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Training and held-out conversations."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"messages": conversation(first, second)} for first in range(9) for second in range(9)]
    held_out = rows[::9]
    training = [row for row in rows if row not in held_out]
    return write_rows(folder / "train.jsonl", training), write_rows(folder / "held_out.jsonl", held_out)
