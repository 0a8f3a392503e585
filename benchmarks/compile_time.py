"""What compiling a Llama costs, stage by stage, as it grows from 2 layers to 80: ``python -m benchmarks.compile_time``.

The model has the shapes of Llama 3 70B and lies on the meta device, so nothing of its weights is ever in memory. Each
size is compiled in a process of its own, whose peak memory is shown, and what it was before the compiler started.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import torch
import transformers
from tabulate import tabulate

import fxshard

STAGES = (
    "normalize", "resolve", "annotate", "propagate", "insert_collectives", "check", "localize", "optimize", "schedule",
    "check_local",
)  # fmt: skip
LAYERS = (2, 8, 32, 80)


def llama(layers: int) -> transformers.LlamaForCausalLM:
    """A Llama with the shapes of the one of 70 billion weights, of ``layers`` layers, without weights."""
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


def peak_mib() -> float:
    """The most memory that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(layers: int, ranks: int, repeats: int) -> dict[str, Any]:
    """Compiles once, and the passes ``repeats`` times more: seconds of each stage (the best), nodes, memory."""
    model = llama(layers)
    call = {"input_ids": torch.zeros(1, 128, dtype=torch.int64, device="meta"), "use_cache": False}
    before = peak_mib()
    best: dict[str, float] = {}
    start = time.perf_counter()
    for _ in range(1 + repeats):
        program = fxshard.parallelize(model, fxshard.tensor_parallel(ranks), (), call)
        for stage, seconds in program.compiled.times_s.items():
            best[stage] = min(best.get(stage, seconds), seconds)
    nodes = len(program.compiled.graph.nodes)
    source = program.code(rank=0)
    total = time.perf_counter() - start
    lines = source.count("\n")
    return {"times": best, "nodes": nodes, "lines": lines, "before": before, "peak": peak_mib(), "total": total}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.compile_time", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--ranks", type=int, default=8, help="the size of the tensor-parallel axis")
    parser.add_argument("--repeats", type=int, default=1, help="how often to compile again, for the best time")
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (layers, options.ranks, options.repeats))
        times = found["times"]
        capture, passes = times["capture"], sum(times.values()) - times["capture"]
        stages = [f"{times[stage] * 1e3:.0f}" for stage in STAGES]
        share = f"{passes / capture:.1%}"
        memory = [f"{found['before']:.0f}", f"{found['peak']:.0f}"]
        rows.append([layers, found["nodes"], f"{capture:.2f}", *stages, f"{passes * 1e3:.0f}", share, *memory])
    names = ["layers", "nodes", "capture (s)", *(f"{s.replace('insert_collectives', 'insert')} (ms)" for s in STAGES)]
    print(tabulate(rows, headers=[*names, "passes (ms)", "of capture", "before (MiB)", "peak (MiB)"]))


if __name__ == "__main__":
    main()
