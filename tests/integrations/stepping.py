"""A loop over ``accelerate``: on one device over a model, on real ranks over a program of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxshard
from fxshard.errors import DistributedError, FxshardError
from fxshard.integrations.accelerate import Accelerator
from tests.integrations.training import under_torchrun
from tests.presets import preset

Steps = list[tuple[float, float, float]]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.dropout(self.norm(self.up(x)).relu(), 0.2, self.training))


class Loop:
    """16 shuffled rows in batches of 4, three batches a step, the last of an epoch one; the weights in float64."""

    def __init__(self, plan: str | None, folder: Path, seed: int = 0) -> None:
        set_seed(seed)
        cls = accelerate.Accelerator if plan is None else Accelerator
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
        self.accelerator = cls(cpu=True, gradient_accumulation_steps=3, project_config=project)
        model: nn.Module = Mlp().double()
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).reshape(16, 6)
        if plan is not None:
            model = fxshard.parallelize(model, preset(plan), (x[:4],))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loader = DataLoader(TensorDataset(x, x.sin()[:, :3]), batch_size=4, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )

    def epoch(self) -> Steps:
        """The loss, the norm before clipping and the rate of each step."""
        out, total = [], 0.0
        for x, y in self.loader:
            assert len(self.accelerator.gather_for_metrics(x)) == 4
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - y).square().mean()
                self.accelerator.backward(loss)
                total += self.accelerator.gather(loss.detach()).mean().item()
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                    out.append((total, norm.item(), self.scheduler.get_last_lr()[0]))
                    total = 0.0
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return out

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole, on rank 0."""
        return {name: tensor.clone() for name, tensor in self.accelerator.get_state_dict(self.model).items()}


def on_one_device(folder: Path) -> tuple[list[Steps], dict[str, torch.Tensor]]:
    """Four epochs."""
    loop = Loop(None, folder)
    return [loop.epoch() for _ in range(4)], loop.weights()


def compare(found: list[Steps], weights: dict[str, torch.Tensor], expected: Any) -> None:
    assert all(len(steps) == 2 for steps in found)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected[0][-len(found) :]), rtol=1e-9, atol=0)
    assert list(weights) == (list(expected[1]) if dist.get_rank() == 0 else [])
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=1e-9)


# --- what ranks run --------------------------------------------------------------------------------------------------


def follows_one_device(plans: list[str], folder: Path, expected: Any) -> None:
    """Losses, norms, rates and weights; and again from a checkpoint, under the next plan."""
    with under_torchrun():
        for plan, other in zip(plans, [*plans[1:], plans[0]], strict=True):
            loop = Loop(plan, folder / plan)
            found = [loop.epoch(), loop.epoch()]
            loop.accelerator.save_state()
            compare([*found, loop.epoch(), loop.epoch()], loop.weights(), expected)
            again = Loop(other, folder / plan, seed=3)
            again.accelerator.load_state()
            compare([again.epoch(), again.epoch()], again.weights(), expected)


def saves_models(folder: Path) -> None:
    """``save_model`` writes whole weights, once."""
    with under_torchrun():
        loop = Loop("tp2", folder)
        whole = loop.model.full_state_dict()
        loop.accelerator.save_model(loop.model, str(folder / "model"))
        dist.barrier()
        fresh = Mlp().double()
        fxshard.load_pretrained(fresh, folder / "model")
        for name, tensor in fresh.state_dict().items():
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0)


def refuses(folder: Path) -> None:
    """What cannot be right."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(DistributedError, match=r"process 0 of 1, torch\.distributed for rank") as caught:
        Accelerator(cpu=True)  # not under torchrun
    assert "torchrun" in str(caught.value.fix)
    with under_torchrun():
        loop = Loop("tp2", folder)
        with pytest.raises(FxshardError, match=r"of 1 parameters cannot be clipped: 1 of them are of a program of 6"):
            loop.accelerator.clip_grad_norm_(loop.model.up.weight, 1.0)
        loop.accelerator.prepare(torch.optim.SGD([loop.model.up.bias], lr=0.1))
        with pytest.raises(FxshardError, match="several optimizers"):
            loop.accelerator.save_state()
    with under_torchrun(), pytest.raises(FxshardError, match="dispatch_batches would give each rank a part"):
        Accelerator(cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(dispatch_batches=True))
