"""Two processes over gloo find what one process finds on the batches of both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import balance, micro_batch
from one_step import gradients_of_one_step
from small_models import small_model

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of the two ranks saved."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(WORKER), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_biases_follow_the_loads_of_all_ranks(ranks, wrapper):
    model = small_model("v3", num_nextn_predict_layers=1)

    def all_batches(update, forward):
        return [micro_batch(update, forward, rank) for rank in range(2)]

    expected_loads, expected_biases = balance(model, model.update_router_bias, all_batches)
    assert any(bias.abs().max() > 0.1 for bias in expected_biases.values())
    for rank in ranks:
        loads, biases = rank[wrapper]
        assert loads == expected_loads
        assert biases.keys() == expected_biases.keys()
        for name, bias in expected_biases.items():
            assert torch.equal(biases[name], bias), name


def test_trainer_on_two_ranks_takes_the_step_of_the_whole_batch(ranks, tmp_path):
    expected = gradients_of_one_step("v3", batch_size=4, accumulation=1, folder=tmp_path)
    for rank in ranks:
        for name, gradient in expected.items():
            # As in test_gradient_accumulation.py: float32 gradients of up to 10, summed in another order.
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=2e-5, rtol=0)
