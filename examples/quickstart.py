"""The whole of fxshard on a laptop: no launcher, no GPU, a few seconds.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from torch import nn

import fxshard
from fxshard import Plan, Replicate, Shard


class Block(nn.Module):
    """Half of a transformer layer, written for one device. Nothing in it knows of any other."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def title(text: str) -> None:
    print(f"\n--- {text} ---\n")


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(16, 64), Block(16, 64))
    x = torch.randn(4, 8, 16)  # [batch, sequence, features]

    title("a preset finds what to split")
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,))
    print(program.plan)

    title("every operator, and the collectives between them")
    program.print_tabular()

    title("why every collective is there")
    print(program.explain())

    title("the Python that rank 1 runs")
    print(program.code(rank=1))

    title("both ranks in this process: the model's own result, and its own gradients")
    run = fxshard.simulate(program, x)
    run.backward(lambda y: y.square().mean())
    model(x).square().mean().backward()
    for rank, y in enumerate(run.outputs):
        print(f"rank {rank}: output differs by at most {(y - model(x)).abs().max():.0e}")
    worst = max((run.full_grads()[name] - p.grad).abs().max() for name, p in model.named_parameters())
    print(f"the {len(run.full_grads())} gradients differ by at most {worst:.0e}")

    title("the same question, asked by fxshard itself")
    report = fxshard.verify(program, x)
    print("ok:", report.ok)

    title("the batch over dp, the weights over tp, in your own words")
    plan = Plan(
        mesh={"dp": 2, "tp": 2},
        params={
            "*.up.weight": {"tp": Shard(0)},
            "*.up.bias": {"tp": Shard(0)},
            "*.down.weight": {"tp": Shard(1)},
            "*.down.bias": {"tp": Replicate()},
        },
        inputs={"*": {"dp": Shard(0)}},
    )
    program = fxshard.parallelize(model, plan, (x,))
    kinds = [(each.kind, each.axis) for each in program.collectives() if each.phase == "forward"]
    print("forward:", ", ".join(f"{kind} over {axis}" for kind, axis in kinds))
    assert fxshard.verify(program, x).ok


if __name__ == "__main__":
    main()
