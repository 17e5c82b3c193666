import json

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from deepseek_hf.finetune import DeepseekTrainer, load_chat_dataset, train
from deepseek_hf.finetune.arguments import FinetuningArguments
from deepseek_hf.finetune.mtp import MtpLossWeightCallback, freeze_all_but_mtp
from deepseek_hf.finetune.router_bias import RouterBiasCallback
from deepseek_hf.modeling import DeepseekV3ForCausalLM
from deepseek_hf.modeling.mtp import init_mtp_from_last_layer


@pytest.fixture
def make_trainer(files, tokenizer, tmp_path):
    dataset, _ = load_chat_dataset(str(files[0]), tokenizer, 64)

    def make(model, *callbacks, **kwargs):
        kwargs = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "learning_rate": 3e-3} | kwargs
        args = FinetuningArguments(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **kwargs)
        collator = DataCollatorForSeq2Seq(tokenizer)
        return DeepseekTrainer(
            model=model, args=args, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks)
        )

    return make


def make_model(config, **fields) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(type(config)(**{**config.to_dict(), **fields}))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_parts_of_the_loss_by_depth_and_weight(make_trainer, config):
    """The weight moves at the shares of the run, and each step's loss is made with its own weight."""
    model = make_model(config, num_nextn_predict_layers=2)
    trainer = make_trainer(model, MtpLossWeightCallback([0.4, 0.4, 0.1]))
    trainer.train()
    logs = trainer.state.log_history[:6]
    assert [log["mtp_loss_weight"] for log in logs] == [0.4, 0.4, 0.4, 0.4, 0.1, 0.1]
    for log in logs:
        assert log["mtp_loss"] == pytest.approx((log["mtp_loss_0"] + log["mtp_loss_1"]) / 2, rel=1e-5)
        total = log["main_loss"] + log["mtp_loss_weight"] * log["mtp_loss"] + log["aux_loss"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)


def test_training_the_mtp_layers_alone(make_trainer, config):
    model = make_model(config)
    freeze_all_but_mtp(model)
    before = weights(model)
    trainer = make_trainer(model, RouterBiasCallback(0.01), max_steps=20)
    trainer.train()
    first = f"model.layers.{config.num_hidden_layers}."
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith(first), name  # every MTP tensor, and no other
    losses = [log["mtp_loss"] for log in trainer.state.log_history if "mtp_loss" in log]
    assert losses[-1] < losses[0] - 0.3


def test_layers_made_from_the_last_layer(config, tmp_path):
    model = make_model(config, num_nextn_predict_layers=0)
    before = weights(model)
    init_mtp_from_last_layer(model, 2)
    assert model.config.num_nextn_predict_layers == len(model.mtp_layers) == 2
    last = model.model.layers[config.num_hidden_layers - 1]
    for layer in model.mtp_layers:
        for name, tensor in last.state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor), name
    torch.testing.assert_close({name: model.state_dict()[name] for name in before}, before, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    ids = torch.arange(5, 17)[None]
    plain = loaded.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert loaded.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, use_mtp=True).equal(plain)
    with pytest.raises(ValueError, match="init_mtp_from_last_layer=1 for a model with 2 MTP layers"):
        init_mtp_from_last_layer(loaded, 1)


def test_made_layers_are_a_better_start_than_random_ones(make_trainer, config):
    """On a model that knows something: after a few steps, the copies of its last layer guess better."""
    model = make_model(config, num_nextn_predict_layers=0)
    make_trainer(model, max_steps=60).train()
    trained = weights(model)
    losses = {}
    for start in ("random", "last layer"):
        model = make_model(config, num_nextn_predict_layers=int(start == "random"))
        model.load_state_dict(trained, strict=False)
        if start == "last layer":
            init_mtp_from_last_layer(model, 1)
        freeze_all_but_mtp(model)
        trainer = make_trainer(model, max_steps=10)
        trainer.train()
        losses[start] = trainer.state.log_history[9]["mtp_loss"]
    assert losses["last layer"] < losses["random"] - 0.05


def recipe(tmp_path, base, files, **fields):
    path = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": str(base),
        "train_file": str(files[0]),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        **fields,
    }
    path.write_text(json.dumps(settings))  # JSON is YAML
    return [str(path)]


def test_a_recipe_fits_a_draft_head_to_a_checkpoint_without(config, tokenizer, files, tmp_path):
    base = tmp_path / "base"
    model = make_model(config, num_nextn_predict_layers=0)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = {"lora": False, "train_mtp_only": True, "init_mtp_from_last_layer": 1, "mtp_loss_weight": [1.0]}
    train.main(recipe(tmp_path, base, files, **options))
    tuned = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out")
    assert len(tuned.mtp_layers) == 1
    found = tuned.state_dict()
    torch.testing.assert_close({n: found[n] for n in model.state_dict()}, model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_mtp_only": True}, "train_mtp_only=True trains MTP layers whole; set lora to false"),
        (
            {"train_mtp_only": True, "lora": False, "mtp_loss_weight": [0.0]},
            r"mtp_loss_weight=\[0.0\] leaves train_mtp_only nothing to do",
        ),
        ({"init_mtp_from_last_layer": 1}, "init_mtp_from_last_layer=1 trains MTP layers whole; set lora to false"),
        ({"lora": False, "init_mtp_from_last_layer": 1}, "for a model with 1 MTP layers"),
        ({"lora": False, "mtp_loss_weight": [0.3, -0.1]}, r"mtp_loss_weight=\[0.3, -0.1\]; accepted"),
    ],
)
def test_what_does_not_fit_is_refused(base, files, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(recipe(tmp_path, base, files, **options))


def test_a_model_without_mtp_layers_is_refused(make_trainer, config):
    model = make_model(config, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="train_mtp_only=True for a model without MTP layers"):
        freeze_all_but_mtp(model)
    with pytest.raises(ValueError, match=r"mtp_loss_weight=\[0.3\] for a model without MTP layers"):
        make_trainer(model, MtpLossWeightCallback([0.3])).train()
