"""What the spawned processes of the checkpoint tests run, and the training that they and one device go on with."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fxshard
from tests.models import uneven
from tests.models.zoo import Built, build, ids

BEFORE, AFTER = 2, 3  # steps


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained: a model of the tests, and how its inputs are made."""

    make: Callable[..., Built]
    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def model(self) -> nn.Module:
        model = copy.deepcopy(self.make(self.name, torch.float64, True, **self.changes)[0])
        next(p for n, p in model.named_parameters() if "ln_f" in n or n.endswith("norm.weight")).requires_grad_(False)
        return model

    def batch(self, step: int) -> torch.Tensor:
        return uneven.words(5, 9, seed=100 + step) if self.make is uneven.build_case else ids(4, 8, seed=100 + step)


GPT2 = Run(build, "gpt2", {"n_layer": 1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0})
LLAMA = Run(build, "llama", {"num_hidden_layers": 1, "tie_word_embeddings": True, "attention_dropout": 0.0})
UNEVEN = Run(uneven.build_case, "gpt2_3_heads")
UNEVEN_LLAMA = Run(uneven.build_case, "llama")


def optimizer_of(trained: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW in two groups: no decay for what has one dim; the frozen parameter is in none."""
    learned = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def train(run: Run, trained: nn.Module, optimizer: Any, scheduler: Any, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        batch = run.batch(step)
        optimizer.zero_grad()
        logits = trained(input_ids=batch, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def start_and_save(run: Run, trained: nn.Module, folder: Path) -> list[float]:
    """The first steps of a run, and a checkpoint after them."""
    torch.manual_seed(7)
    optimizer, scheduler = optimizer_of(trained)
    losses = train(run, trained, optimizer, scheduler, 0, BEFORE)
    fxshard.save_checkpoint(
        folder, trained, optimizer, step=BEFORE, extra={"scheduler": scheduler.state_dict(), "losses": losses}
    )
    return losses


def load_and_go_on(run: Run, trained: nn.Module, folder: Path) -> list[float]:
    """The next steps, from what was saved alone: everything that is loaded was spoilt before."""
    torch.manual_seed(1234 + (dist.get_rank() if dist.is_initialized() else 0))
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            tensor.fill_(float("nan"))
    optimizer, scheduler = optimizer_of(trained)
    loaded = fxshard.load_checkpoint(folder, trained, optimizer)
    assert loaded.step == BEFORE
    scheduler.load_state_dict(loaded.extra["scheduler"])
    return train(run, trained, optimizer, scheduler, BEFORE, AFTER)


def resume_on_every_mesh(run: Run, plans: dict[str, Any], folder: str, expected: list[float]) -> None:
    """Saves under every plan, then loads each checkpoint under three of them: the losses are one device's."""
    model = run.model()
    programs = {
        name: fxshard.parallelize(model, plan, (), {"input_ids": run.batch(0), "use_cache": False})
        for name, plan in plans.items()
    }
    start = {name: copy.deepcopy(program.state_dict()) for name, program in programs.items()}
    for name, program in programs.items():
        losses = start_and_save(run, program, Path(folder, name))
        torch.testing.assert_close(losses, expected[:BEFORE], rtol=1e-9, atol=0)
    for name, program in programs.items():
        assert any(not torch.equal(t, start[name][key]) for key, t in program.state_dict().items())
    names = list(programs)
    for at, saved in enumerate(("one", *programs)):  # its own plan and two others, so that each plan loads three
        for name in dict.fromkeys(names[(at + step) % len(names)] for step in (0, len(names) // 2, -1)):
            losses = load_and_go_on(run, programs[name], Path(folder, saved))
            error = f"saved on {saved}, resumed on {name}: {losses} for {expected[BEFORE:]}"
            torch.testing.assert_close(losses, expected[BEFORE:], rtol=1e-9, atol=0, msg=error)
