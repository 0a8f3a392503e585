"""A program eagerly and under torch.compile, on gloo ranks of this machine: time of a forward and of a whole pass.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py --hidden 64 512 --plans tp sp dp zero

Rounds of both alternate, so that what else the machine does meets both; the median of the rounds is told. Needs a C++
compiler, and transformers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

import fxshard

PLANS = {
    "tp": fxshard.tensor_parallel,
    "sp": fxshard.sequence_parallel,
    "dp": fxshard.data_parallel,
    "zero": fxshard.zero,
}


def llama(hidden: int, layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def forward(call: Callable[..., torch.Tensor], ids: torch.Tensor) -> None:
    with torch.no_grad():
        call(ids)


def both(call: Callable[..., torch.Tensor], ids: torch.Tensor) -> None:
    call(ids).logits.square().mean().backward()


def time_ms(step: Callable[..., None], call: Callable[..., torch.Tensor], ids: torch.Tensor, calls: int) -> float:
    """The mean time of a call, as the slowest rank has it."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        step(call, ids)
    taken = torch.tensor((time.perf_counter() - start) / calls * 1e3)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def measure(rank: int, world: int, folder: str, given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for hidden in given.hidden:
        for plan in given.plans:
            torch.manual_seed(0)
            model = llama(hidden, given.layers).eval()
            ids = torch.randint(1024, (given.batch, given.length))
            program = fxshard.parallelize(model, PLANS[plan](world), (ids,))
            torch.compiler.reset()
            ways = {"eager": program, "compiled": torch.compile(program, fullgraph=True)}
            for name, step in (("forward", forward), ("forward and backward", both)):
                start = time.perf_counter()
                for _ in range(3):
                    for call in ways.values():
                        step(call, ids)
                warm_s = time.perf_counter() - start
                rounds: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(given.rounds):
                    for way, call in ways.items():
                        rounds[way].append(time_ms(step, call, ids, given.calls))
                eager, compiled = (statistics.median(times) for times in rounds.values())
                ratio = statistics.median(c / e for e, c in zip(*rounds.values(), strict=True))
                if rank == 0:
                    print(
                        f"hidden {hidden:>5}  {plan:<5} {name:<21} eager {eager:8.2f} ms   "
                        f"compiled {compiled:8.2f} ms   {ratio:.2f}x   ({warm_s:.0f} s to compile)",
                        flush=True,
                    )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10)
    given = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (given.ranks, folder, given), nprocs=given.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
