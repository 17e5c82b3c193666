"""What `test_distributed.py` runs on each of two processes, under torchrun:

    torchrun --standalone --nproc-per-node 2 tests/modeling/distributed_worker.py FOLDER

Each rank saves what it found to FOLDER/rank<rank>.pt.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from one_step import gradients_of_one_step
from small_models import random_ids, small_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

UPDATES, FORWARDS = 3, 2  # optimizer steps, and micro-batches in each
SPEED = 0.05  # so large that the biases soon decide the routing


def micro_batch(update: int, forward: int, rank: int) -> dict[str, torch.Tensor]:
    """Another batch for each step, micro-batch and rank; rank 1's is longer, and padded."""
    ids = random_ids(2, 6 + 4 * rank, seed=100 * update + 10 * forward + rank)
    mask = torch.ones_like(ids)
    mask[0, 5 + rank :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def balance(model, update_router_bias, batches, no_sync=contextlib.nullcontext):
    """Forward and backward passes on `batches(update, forward)`, with a bias update every `FORWARDS`.

    Returns the loads of each update and the final state of the biases.
    """
    model.train()
    loads = []
    for update in range(UPDATES):
        for forward in range(FORWARDS):
            with contextlib.nullcontext() if forward == FORWARDS - 1 else no_sync():
                for batch in batches(update, forward):
                    model(**batch).loss.backward()
        loads.append({layer: load.tolist() for layer, load in update_router_bias(SPEED).items()})
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    return loads, {name.removeprefix("module."): bias for name, bias in biases.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def own_batches(update, forward):
        return [micro_batch(update, forward, rank)]

    replicated = small_model("v3", num_nextn_predict_layers=1)
    wrapped = DistributedDataParallel(replicated)
    found = {"ddp": balance(wrapped, replicated.update_router_bias, own_batches, wrapped.no_sync)}

    sharded = small_model("v3", num_nextn_predict_layers=1)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    found["fsdp"] = balance(sharded, sharded.update_router_bias, own_batches)

    found["gradients"] = gradients_of_one_step("v3", batch_size=1, accumulation=2, folder=folder / f"trainer{rank}")
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
