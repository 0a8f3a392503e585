"""What ranks run to show that a module of a model can be replaced by its program: a tower whole, the rest split."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import fxshard
from tests.presets import preset


class Seeing(nn.Module):
    """A tower that stays whole, and a language model."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
        )
        self.tower = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 32))
        self.language_model = transformers.LlamaForCausalLM(config)

    def forward(self, ids: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        words = self.language_model.get_input_embeddings()(ids)
        embeds = torch.cat([self.tower(patches), words], 1)
        labels = torch.cat([torch.full(patches.shape[:2], -100), ids], 1)
        loss: torch.Tensor = self.language_model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
        return loss


def replaced(plans: tuple[str, ...]) -> None:
    """Five steps: losses, and the weights of the tower and of the language model."""
    for plan in plans:
        torch.manual_seed(0)
        one = Seeing().double()
        many = copy.deepcopy(one)
        ids, patches = torch.randint(0, 64, (4, 6)), torch.randn(4, 5, 12, dtype=torch.float64)
        example = {
            "inputs_embeds": torch.randn(4, 11, 32, dtype=torch.float64, requires_grad=True),
            "labels": torch.zeros(4, 11, dtype=torch.int64),
            "use_cache": False,
        }
        axis = preset(plan).mesh.names[0]
        whole_table = fxshard.Plan(params={"model.embed_tokens.weight": {axis: fxshard.Replicate()}})
        program = fxshard.parallelize(many.language_model, preset(plan) | whole_table, (), example)
        many.language_model = program
        optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (one, many)]
        for _ in range(5):
            losses = []
            for module, optimizer in zip((one, many), optimizers, strict=True):
                optimizer.zero_grad()
                loss = module(ids, patches)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert abs(losses[0] - losses[1]) < 2e-6, (plan, losses)  # the loss is in float32
        whole = program.full_state_dict()
        for name, weight in one.language_model.state_dict().items():
            torch.testing.assert_close(whole[name], weight, rtol=1e-5, atol=1e-6)
        for name, weight in one.tower.state_dict().items():
            torch.testing.assert_close(many.tower.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def wrapped() -> None:
    """DDP over what holds a program would make replicas of its parts."""
    program = fxshard.parallelize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), preset("tp2"))
    program(torch.randn(4, 8))
    whole = nn.Sequential(program, nn.Linear(8, 2))
    with pytest.raises(fxshard.errors.FxshardError, match="DistributedDataParallel cannot wrap a program"):
        nn.parallel.DistributedDataParallel(whole)
