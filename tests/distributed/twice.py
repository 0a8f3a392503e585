"""Second derivatives: models, losses of gradients, and what ranks run to show that they are those of one device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from tests.presets import preset


class Attending(nn.Module):
    """A block with attention, norms and a smooth MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(-2))
        out: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Words(nn.Module):
    """An embedding, tied to the head that scores the words, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(24, 12), Attending()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(24).view(4, 6)
        h = self.block(self.embed(ids) + x)
        return F.cross_entropy((h @ self.embed.weight.t()).flatten(0, 1), ids.flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)),
    "attention": Attending,
    "words": Words,
    "two layers": lambda: nn.Sequential(Attending(), nn.SiLU(), Attending()),
}
PLANS = ("tp2", "sp2", "dp2", "zero2", "cp2")


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return out.pow(3).mean() + out.sin().mean()


def penalty_of(grads: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([grad.pow(2).sum() + grad.sin().sum() for grad in grads.values()]).sum()


def on_one_device(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a loss and a penalty on all of its gradients."""
    wanted = {"input": x} | dict(model.named_parameters())
    out = model(x)
    made = torch.autograd.grad(loss_of(out), list(wanted.values()), create_graph=True)
    loss = loss_of(out) + penalty_of(dict(zip(wanted, made, strict=True)))
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def example() -> torch.Tensor:
    return torch.randn(4, 6, 12, dtype=torch.float64, requires_grad=True)


def penalties(world: int) -> None:
    """Two steps of ``backward`` with a penalty, and without: with buckets, packs, and collectives under way."""
    plans = PLANS if world == 2 else ("dp2_tp2", "zero2_tp2", "tp3")
    for plan in [each for each in plans if preset(each).mesh.world_size == world]:
        for make in MODELS.values():
            torch.manual_seed(0)
            model, x = make().double(), example()
            program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (x,), bucket_bytes=600)
            want = on_one_device(model, x)
            for _ in range(2):
                program.zero_grad(set_to_none=True)
                out = program(x)
                parts = [p for p in program.parameters() if p.requires_grad]
                made = torch.autograd.grad(loss_of(out), [x, *parts], create_graph=True)
                x.grad = None
                (loss_of(out) + penalty_of(dict(enumerate(made)))).backward()  # type: ignore[arg-type]
                grads = {"input": x.grad} | program.full_grads()
                for name, value in want.items():
                    torch.testing.assert_close(grads[name], value, msg=lambda t, at=f"{plan} {name}": f"{at}: {t}")
