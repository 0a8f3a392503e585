"""What the spawned processes run: each function is one rank's whole job, and fails by an ``AssertionError``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fxshard
from fxshard import Plan, Shard, data_parallel, tensor_parallel
from fxshard.errors import DistributedError, InputError, MeshError
from fxshard.runtime import collectives
from tests.helpers import Result, problems_of, run_original, tensors_of, weighted_loss
from tests.models import uneven
from tests.models.zoo import Built, build, dynamic, ids, sized
from tests.presets import presets

PLANS = presets("tp2", "sp2", "dp2", "tp4", "sp4", "dp4", "dp2_tp2", "tp2_dp2", "dp2_sp2") | uneven.PLANS


def run_rank(program: fxshard.ParallelModule, inputs: dict[str, Any]) -> Result:
    """One forward and backward pass of this rank, as a user's script does it."""
    program.zero_grad(set_to_none=True)
    output = program(**inputs)
    loss = weighted_loss(output)
    loss.backward()
    outputs = {path: tensor.detach().clone() for path, tensor in tensors_of(output)}
    return Result([outputs], program.full_grads(), [type(output)], loss=loss.item())


def equal_the_original(
    cases: list[tuple[str, str]],
    dtype: torch.dtype,
    training: bool = False,
    make: Callable[[str, torch.dtype, bool], Built] = build,
) -> None:
    """Outputs, whole gradients and whole weights of (model, plan) pairs."""
    found = []
    for name, plan in cases:
        model, inputs = make(name, dtype, training)
        program = fxshard.parallelize(model, PLANS[plan], (), inputs)
        torch.manual_seed(7)
        expected = run_original(model, (), inputs, seed=7)
        torch.manual_seed(7 + dist.get_rank())  # rank 0's random state goes for all
        problems = problems_of(run_rank(program, inputs), expected)
        whole, state = model.state_dict(), program.full_state_dict()
        if list(state) != list(whole) or not all(torch.equal(state[key], whole[key]) for key in whole):
            problems.append("the whole state dict differs")
        held = sum(p.numel() for p in program.parameters()) / sum(p.numel() for p in model.parameters())
        if held > (0.75 if program.plan.params else 1):
            problems.append(f"this rank holds {held:.0%} of the weights")
        found += [f"{name} under {plan}, rank {dist.get_rank()}: {problem}" for problem in problems]
    assert not found, "\n".join(found)


def train_gpt2(plan: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, steps: int = 20) -> None:
    """AdamW, a new batch a step: the losses and the final weights are those of one device, its masks included.

    The loss is the model's own in float32; transformers computes it in float32 always, so in float64 it is made here.
    """
    changes = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model, _ = build("gpt2", dtype, True, **changes)
    batches = [ids(seed=100 + step) for step in range(steps)]
    single = dtype == torch.float32
    first = {"input_ids": batches[0], "labels": batches[0]} if single else {"input_ids": batches[0]}
    program = fxshard.parallelize(model, PLANS[plan], (), first)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses: list[list[float]] = []
    for trained in (program, model):
        torch.manual_seed(7 + (dist.get_rank() if trained is program else 0))  # rank 0's random state goes for all
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        losses.append([])
        for batch in batches:
            optimizer.zero_grad()
            if single:
                loss = trained(input_ids=batch, labels=batch).loss
            else:
                logits = trained(input_ids=batch).logits
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    rtol = 1e-5 if single else 1e-9
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=rtol, atol=0)
    assert losses[0][-1] != losses[0][0]
    state, atol = program.full_state_dict(), 1e-4 if single else 1e-9
    for name, want in model.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    moved = [name for name, want in start.items() if (state[name] - want).abs().max() > 1e-3]
    assert len(moved) > len(start) / 2, moved


def many_sizes(cases: list[tuple[str, str]]) -> None:
    """Batch and length symbolic: one capture for the sizes that divide, one more for each that does not."""
    for name, plan in cases:
        model, inputs = build(name)
        program = fxshard.parallelize(model, PLANS[plan], (), inputs, dynamic_shapes=dynamic(name))
        for size in ((4, 16), (8, 24), (5, 17), (4, 16), (3, 6)):
            call = sized(name, *size)
            problems = problems_of(run_rank(program, call), run_original(model, (), call))
            assert not problems, "\n".join([f"{name} under {plan} at {size}:", *problems[:10]])
        cuts = "dp" in plan or ("sp" in plan and name != "vit")
        assert len(program._captures.all) == (3 if cuts else 1)
        with pytest.raises(InputError, match="dim 0 is 65, outside of its range 2 to 64"):
            program(**sized(name, 65, 16))


class Statistics(torch.nn.Module):
    """A norm over the batch, and all that ranks share of a split dim in other ways than by sums."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = torch.nn.Linear(8, 12), torch.nn.BatchNorm1d(12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.norm(self.up(x))
        best, where = h.max(0)
        found = (h > 1).any(0) | (h.argmin(0) > 3)
        return h.var(0), h.logsumexp(0), h.cumsum(0), best * where, h.prod(0) * found, h.amax()


def statistics_of_a_split_batch() -> None:
    """Two steps: outputs, gradients and the running buffers are one device's."""
    model, x = Statistics().double(), torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    program = fxshard.parallelize(model, data_parallel(2), (x,))
    for _ in range(2):
        expected, found = model(x), program(x)
        for made, want in zip(found, expected, strict=True):
            torch.testing.assert_close(made, want, rtol=1e-10, atol=1e-10)
        for trained, outputs in ((model, expected), (program, found)):
            trained.zero_grad(set_to_none=True)
            weighted_loss(outputs).backward()
    grads = program.full_grads()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-8, atol=1e-8)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(program.full_state_dict()[name], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(program.state_dict()[name], want, rtol=1e-12, atol=1e-12)


def verify_and_refuse() -> None:
    """What fxshard says on two real ranks: of a right program, of a wrong collective, of a mesh that does not fit."""
    model, inputs = build("llama", torch.float32)
    program = fxshard.parallelize(model, tensor_parallel(2), (), inputs)
    report = fxshard.verify(program, **inputs)
    assert report.ok, str(report)
    assert report.first_divergence is None
    assert report.max_output_error < 1e-5
    assert all(p.grad is None for p in program.parameters()), "verify left gradients behind"

    # The ranks of a simulation, within a real rank, return what the real ranks return.
    real, simulated = program(**inputs), fxshard.simulate(program, **inputs).outputs
    for output in simulated:
        torch.testing.assert_close(output.logits, real.logits, rtol=0, atol=1e-6)

    kept = dict(collectives._RAW)
    for name in ("all_reduce", "all_reduce_"):
        collectives._RAW[name] = lambda group, x, dim, right=kept[name]: 2 * right(group, x, dim)
    try:
        report = fxshard.verify(program, **inputs)
    finally:
        collectives._RAW.update(kept)
    assert not report.ok
    assert report.first_divergence

    for plan, said in ((tensor_parallel(4), "4 ranks"), (data_parallel(2) | tensor_parallel(2), "4 ranks")):
        with pytest.raises(MeshError, match=f"has {said}, but 2 processes run") as caught:
            fxshard.parallelize(model, plan, (), inputs)
        assert caught.value.fix
        assert "torchrun --nproc-per-node 4" in caught.value.fix

    # Split outputs: every rank returns its own rows, and whole gradients come from the ranks' own losses.
    split = data_parallel(2) | Plan({"dp": 2}, outputs={"0": {"dp": Shard(0)}})
    inputs["use_cache"] = False
    program = fxshard.parallelize(model, split, (), inputs)
    logits = program(**inputs).logits
    rank = dist.get_rank()
    want = model(**inputs).logits
    torch.testing.assert_close(logits, want.chunk(2)[rank], rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(want.square().sum(), parameters), strict=True))
    for name, grad in program.full_grads().items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-4 * grads[name].abs().max().item())


def different_weights() -> None:
    """Every rank seeds for itself: nothing may run."""
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    x = torch.ones(4, 8)
    program = fxshard.parallelize(model, tensor_parallel(2), (x,))
    with pytest.raises(DistributedError, match=r"different weights: 4 tensors differ, first '0\.weight'"):
        program(x)


def low_precision() -> None:
    """Sums in bfloat16 and in float32, and autocast around the call: real ranks round as simulated ones do."""
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model, inputs = build("llama", dtype)
        inputs["use_cache"] = False
        for reduce_dtype in (None, torch.float32):
            program = fxshard.parallelize(model, tensor_parallel(2), (), inputs, reduce_dtype=reduce_dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = run_rank(program, inputs)
                real = program(**inputs).logits
                simulated = fxshard.simulate(program, **inputs).outputs[dist.get_rank()].logits
            assert real.dtype == torch.bfloat16
            assert torch.equal(real, simulated)
            assert {name: g.dtype for name, g in result.grads.items()} == dict.fromkeys(result.grads, dtype)
