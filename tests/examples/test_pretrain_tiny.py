import copy
import json

import pytest
import torch
from pretrain_tiny import TINY, Clock, PretrainingArguments, pack, pretrain
from safetensors import safe_open
from stdlib_corpus import Corpus
from transformers import AutoModelForCausalLM, AutoTokenizer


def small_config():
    config = copy.deepcopy(TINY)
    for name, value in {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}.items():
        setattr(config, name, value)
    config.moe_intermediate_size = config.kv_lora_rank = 16
    return config


@pytest.fixture(scope="module")
def small_corpus(corpus):
    train = {path: corpus.train[path] for path in ("bisect.py", "heapq.py", "queue.py")}
    return Corpus(train=train, held_out={path: corpus.held_out[path] for path in ("sched.py", "chunk.py")})


@pytest.fixture(scope="module")
def pretrained(small_corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("pretrained")
    arguments = PretrainingArguments(
        output_dir=str(output_dir), max_steps=3, rows_per_step=2, row_length=64, log_every=1, eval_every=2
    )
    pretrain(arguments, small_config(), small_corpus)
    return output_dir


def test_packed_rows(tokenizer):
    texts = ["a = 1\n", "def f():\n    return 2\n"]
    first, second = (tokenizer(text)["input_ids"] for text in texts)
    stream = [*first, tokenizer.eos_token_id, *second, tokenizer.eos_token_id]
    (row,) = pack(texts, tokenizer, len(stream))
    assert row["input_ids"] == stream
    assert row["position_ids"] == [*range(len(first) + 1), *range(len(second) + 1)]
    assert row["labels"] == [-100, *first[1:], tokenizer.eos_token_id, -100, *second[1:], tokenizer.eos_token_id]
    # A row that begins within a document counts its positions from 0: it sees nothing of what came before.
    assert [row["position_ids"][0] for row in pack(texts, tokenizer, 5)] == [0] * (len(stream) // 5)


def test_a_row_longer_than_everything_is_refused(tokenizer):
    with pytest.raises(ValueError, match="row_length=512"):
        pack(["a = 1\n"], tokenizer, 512)


def test_learning_rate_follows_the_clock():
    clock = Clock(max_minutes=1e9, max_steps=1000)
    factors = [clock.learning_rate_factor(step) for step in range(1001)]
    assert factors[0] < 0.1 and max(factors) == factors[20] == factors[500] == 1
    assert factors[750] == pytest.approx(0.5) and factors[1000] == 0


def test_saved_model_loads(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    assert type(model).__module__.startswith("deepseek_hf.")
    assert model.config.num_nextn_predict_layers == 1
    inputs = tokenizer("def f(x):\n", return_tensors="pt")
    output = model(**inputs, labels=inputs["input_ids"], output_mtp_logits=True)
    assert output.logits.isfinite().all() and output.mtp_loss.isfinite()
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 4
    with safe_open(pretrained / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
        # The MTP layer comes after the two main ones and is written out one tensor per expert.
        assert "model.layers.2.mlp.experts.7.down_proj.weight" in file.keys()  # noqa: SIM118


def test_router_bias_has_moved(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    speed = PretrainingArguments("unused").router_bias_speed
    # Three steps of ±speed; bfloat16 keeps 8 bits.
    assert 0 < bias.abs().max() <= 3 * speed * (1 + 2**-8)


def test_log_holds_both_heads(pretrained):
    log = json.loads((pretrained / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "main_loss" in entry] == [1, 2, 3]
    held_out = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in held_out] == [2, 3]
    assert {"eval_mtp_loss", "eval_mtp_agreement", "eval_max_vio_1", "eval_max_vio_2"} <= held_out[-1].keys()
    training = next(entry for entry in log if "main_loss" in entry)
    # An untrained model is close to uniform over its 512 tokens: log(512) = 6.24; 0.02-wide weights move it by less.
    assert training["main_loss"] == pytest.approx(6.24, abs=0.3)
    assert training["mtp_loss"] == pytest.approx(6.24, abs=0.3)


def test_model_card(pretrained):
    card = (pretrained / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "| loss (nats a token) |" in card and "▮" in card
    assert "3 steps of 2 rows" in card
    assert (pretrained / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_model_is_not_replaced(pretrained):
    with pytest.raises(FileExistsError, match="--overwrite"):
        PretrainingArguments(output_dir=str(pretrained))
    assert PretrainingArguments(output_dir=str(pretrained), overwrite=True).overwrite


@pytest.mark.parametrize(("name", "value"), [("max_minutes", 0), ("max_steps", 0)])
def test_bad_arguments(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PretrainingArguments(output_dir=str(tmp_path), **{name: value})
