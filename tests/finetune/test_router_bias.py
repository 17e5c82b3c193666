import pytest
import torch

from deepseek_hf.configuration import DeepseekV2Config
from deepseek_hf.finetune import DeepseekTrainer, RouterBiasCallback, add_adapter
from deepseek_hf.finetune.arguments import FinetuningArguments
from deepseek_hf.finetune.router_bias import max_violation
from deepseek_hf.modeling import DeepseekV2ForCausalLM

MOE_LAYERS = (1, 2)  # 2 is the MTP layer


@pytest.mark.parametrize(("load", "expected"), [([3, 3, 3, 3], 0.0), ([8, 8, 0, 0], 1.0), ([6, 4, 1, 1], 1.0)])
def test_max_violation(load, expected):
    assert max_violation(torch.tensor(load)).item() == expected


@pytest.fixture
def train(tmp_path, tokenizer):
    """Two steps on one batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (8, 12), generator=generator).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(model, speed):
        args = FinetuningArguments(
            str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True
        )
        trainer = DeepseekTrainer(model=model, args=args, train_dataset=rows, callbacks=[RouterBiasCallback(speed)])
        trainer.train()
        return trainer.state.log_history

    return run


def biases(model):
    return [model.model.layers[layer].mlp.gate.e_score_correction_bias for layer in MOE_LAYERS]


@pytest.fixture
def loads(model):
    """Every load of an expert layer, in the order of the forwards, counted from what the routers return."""
    counted = []

    def count(module, inputs, output):
        counted.append(torch.bincount(output[2].flatten(), minlength=4))

    for layer in MOE_LAYERS:
        model.model.layers[layer].mlp.gate.register_forward_hook(count)
    return counted


def test_biases_move_by_speed_each_step(model, train, loads):
    train(model, 0.125)
    expected = [sum(0.125 * torch.sign(load.float().mean() - load) for load in loads[layer::2]) for layer in range(2)]
    assert len(loads) == 4
    torch.testing.assert_close(biases(model), expected, rtol=0, atol=0)  # sums of 0.125 are exact


def test_max_vio_is_logged_and_speed_zero_moves_nothing(model, train, loads):
    history = train(model, 0.0)
    assert all(bias.eq(0).all() for bias in biases(model))
    for step in range(2):
        expected = sum(max_violation(load).item() for load in loads[2 * step : 2 * step + 2]) / 2
        assert history[step]["max_vio"] == pytest.approx(expected, abs=1e-6)  # float32 rounding


def test_adapter_training_reports_max_vio(model, train):
    assert "max_vio" in train(add_adapter(model, 4, 8, ["attention"]), 0.0)[0]


def test_model_without_biases(config, train):
    fields = {key: value for key, value in config.to_dict().items() if key in DeepseekV2Config().to_dict()}
    fields |= {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax"}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**fields))
    assert "max_vio" in train(model, 0.0)[0]
    with pytest.raises(ValueError, match=r"router_bias_speed=0.1: .*topk_method='greedy'"):
        train(model, 0.1)


def test_negative_speed():
    with pytest.raises(ValueError, match="router_bias_speed=-1"):
        RouterBiasCallback(-1)
