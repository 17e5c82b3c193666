"""deepseek_hf against transformers' own DeepSeek-V2 classes, over the same weights, in one run.

    python benchmarks/run.py                     # all rows
    python benchmarks/run.py decode experts      # some of them
    python benchmarks/run.py --device cuda       # bfloat16 and all 27 layers

Writes `benchmarks/results/<machine>.{json,md}` and plots; `benchmarks/README.md` says how to read them.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator

import torch
from machine import Machine
from models import ALL_LAYERS
from report import HEADER, Report, table_row
from results import Result, Setup
from rows import cache, cache_agreement, compiled, decode, drafting, expert_lora, experts, lora, prefill, switch_point

ROWS: dict[str, Callable[[Setup], Iterator[Result]]] = {
    "decode": decode.run_contexts,
    "decode-batch": decode.run_batch,
    "prefill": prefill.run,
    "prefill-16k": prefill.run_long,
    "lora": lora.run,
    "expert-lora": expert_lora.run,
    "experts": experts.run,
    "cache": cache.run,
    "cache-agreement": cache_agreement.run,
    "switch-point": switch_point.run,
    "compiled": compiled.run,
    "drafting-tiny": drafting.run_tiny,
    "drafting": drafting.run_v2_lite,
    "mtp-loss": drafting.run_loss,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all if none is named")
    parser.add_argument(
        "--layers", type=int, help="decoder layers, the first dense; otherwise as the row says, 27 on cuda"
    )
    parser.add_argument("--repetitions", type=int, help="of each timed call; otherwise as the row says")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on cpu, bfloat16 on cuda")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"row is {', '.join(sorted(unknown))}; accepted: {', '.join(ROWS)}")
    if arguments.layers is not None and arguments.layers < 2:
        parser.error(f"--layers is {arguments.layers}; accepted: at least 2, as the first layer is dense")
    if arguments.repetitions is not None and arguments.repetitions < 1:
        parser.error(f"--repetitions is {arguments.repetitions}; accepted: at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    layers = arguments.layers or (ALL_LAYERS if on_gpu else None)

    machine = Machine(device, dtype)
    limits = machine.measure_limits()
    setup = Setup(machine, device, dtype, layers, arguments.repetitions)
    print(
        f"{machine}: {limits.flops_per_second / 1e9:.0f} GFLOP/s in matrix products, "
        f"{limits.bytes_per_second / 1e9:.1f} GB/s reading weights",
        flush=True,
    )
    report = Report(machine)
    for row in arguments.rows or ROWS:
        start = time.perf_counter()
        print(f"{row} …", flush=True)
        for result in ROWS[row](setup):
            report.add(result)
            cells = table_row(result.as_dict())
            print("; ".join(f"{name} {cell}" for name, cell in zip(HEADER, cells, strict=True) if cell), flush=True)
        gc.collect()  # the row's models, before the next row builds its own
        print(f"{row} took {time.perf_counter() - start:.0f} s", flush=True)
    print(f"written: {report.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
