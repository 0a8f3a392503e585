"""``ParallelModule`` and ``simulate`` as a user meets them: modules, modes, steps, randomness, what can be seen."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxshard
from fxshard import Plan, Replicate, Shard, data_parallel, sequence_parallel, tensor_parallel
from fxshard.errors import InputError
from fxshard.passes.pipeline import STAGES
from tests.helpers import assert_equivalent, run_original

X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A pair of weights, a norm with running statistics, dropout, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        y = self.norm(x + self.down(self.drop(F.gelu(self.up(x)))))
        return {"y": y * self.scratch, "mean": y.mean()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def total(output: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["y"].square().sum() + output["mean"]


PLANS = {
    "tp": tensor_parallel(2),
    "dp": data_parallel(2),
    "dp_tp": data_parallel(2) | tensor_parallel(2),
    "sp": sequence_parallel(2),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


# --- a module like any other ----------------------------------------------------------------------------------------


@each_plan
def test_parameters_and_buffers_go_by_their_names(plan: Plan) -> None:
    model = net()
    program = fxshard.parallelize(model, plan, (X,))
    assert isinstance(program, nn.Module)
    assert [n for n, _ in program.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert {n for n, _ in program.named_buffers()} == {n for n, _ in model.named_buffers()}
    assert set(program.state_dict()) == set(model.state_dict()), "scratch is not persistent"
    assert all(type(p) is nn.Parameter and p.is_leaf for p in program.parameters())
    for name, parameter in program.named_parameters():
        assert parameter is program.rank_module(0).get_parameter(name)


def test_the_model_is_left_as_it_was() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    fxshard.simulate(program, X).backward(total)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_buffers_are_updated_on_every_rank() -> None:
    for plan in PLANS.values():
        model = net()
        program = fxshard.parallelize(model, plan, (X,))
        for step in range(1, 3):
            torch.manual_seed(step)
            model(X)
            torch.manual_seed(step)
            fxshard.simulate(program, X)
            for rank in range(program.mesh.world_size):
                assert program.rank_module(rank).calls == step
            state = program.full_state_dict()
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01)]
)
@each_plan
def test_an_optimizer_a_rank_trains_as_one_device(plan: Plan, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = net()
    program = fxshard.parallelize(model, plan, (X,))
    ranks = [program.rank_module(r) for r in range(program.mesh.world_size)]
    whole, parts = make(model.parameters()), [make(rank.parameters()) for rank in ranks]
    for step in range(4):
        torch.manual_seed(step)
        loss = total(model(X))
        torch.manual_seed(step)
        run = fxshard.simulate(program, X)
        losses = run.backward(total)
        assert all(torch.allclose(each, loss, rtol=1e-12) for each in losses)
        loss.backward()
        for optimizer in (whole, *parts):
            optimizer.step()
            optimizer.zero_grad()
    state = program.full_state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-11)


# --- modes ----------------------------------------------------------------------------------------------------------


def test_train_and_eval_are_captured_apart() -> None:
    model = net()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    assert program.training
    program.eval()
    outputs = fxshard.simulate(program, X).outputs
    assert not program.training
    copied = net().eval()
    torch.testing.assert_close(outputs[1]["y"], copied(X)["y"], rtol=1e-12, atol=1e-12)
    assert program.rank_module(0).calls == 1
    program.train()
    torch.manual_seed(1)
    outputs = fxshard.simulate(program, X).outputs
    copied = net()
    torch.manual_seed(1)
    torch.testing.assert_close(outputs[1]["y"], copied(X)["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    program = fxshard.parallelize(net().eval(), data_parallel(2) | tensor_parallel(2), (X,))
    with mode():
        outputs = fxshard.simulate(program, X).outputs
    assert not any(o["y"].requires_grad for o in outputs)
    torch.testing.assert_close(outputs[3]["y"], net().eval()(X)["y"].detach(), rtol=1e-12, atol=1e-12)


def test_autocast_is_the_callers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(4, 8)
    program = fxshard.parallelize(model, tensor_parallel(2), (x,))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = fxshard.simulate(program, x).outputs
        expected = model(x)
    torch.testing.assert_close(outputs[0], expected, rtol=0.05, atol=0.05, check_dtype=False)
    assert not torch.allclose(outputs[0].float(), model(x), rtol=1e-4, atol=1e-4), "it computed in bfloat16"


# --- steps ----------------------------------------------------------------------------------------------------------


def test_gradients_accumulate_and_a_run_knows_its_own() -> None:
    model = net().eval()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    runs = [fxshard.simulate(program, X) for _ in range(2)]
    for run in runs:
        run.backward(total)
    once = run_original(model, (X,), loss=total).grads
    for run in runs:
        for name, grad in run.full_grads().items():
            torch.testing.assert_close(grad, once[name], rtol=1e-10, atol=1e-12)
    for name, grad in program.full_grads().items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-10, atol=1e-12)
    program.zero_grad()


def test_gradients_before_a_backward_pass_are_an_error() -> None:
    run = fxshard.simulate(fxshard.parallelize(net(), tensor_parallel(2), (X,)), X)
    with pytest.raises(RuntimeError, match=r"call backward\(loss_fn\) first"):
        run.full_grads()


def test_a_loss_of_part_of_the_outputs() -> None:
    model = net().eval()
    assert_equivalent(model, data_parallel(2) | tensor_parallel(2), (X,), loss=lambda output: output["mean"])


# --- randomness -----------------------------------------------------------------------------------------------------


def test_the_random_state_goes_on_as_on_one_device() -> None:
    program = fxshard.parallelize(net(), data_parallel(2) | tensor_parallel(2), (X,))
    torch.manual_seed(5)
    net_now = copy.deepcopy(program._original.get())
    one = [net_now(X)["y"] for _ in range(2)]
    after = torch.rand(3)
    torch.manual_seed(5)
    many = [fxshard.simulate(program, X).outputs[2]["y"] for _ in range(2)]
    assert torch.equal(torch.rand(3), after)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_program_that_draws_nothing_leaves_the_random_state() -> None:
    program = fxshard.parallelize(net().eval(), tensor_parallel(2), (X,))
    state = torch.get_rng_state()
    fxshard.simulate(program, X)
    assert torch.equal(torch.get_rng_state(), state)


# --- errors in ranks ------------------------------------------------------------------------------------------------


def test_an_error_in_a_rank_is_raised_and_the_next_run_works() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    model, ids = Lookup(), torch.arange(8).view(4, 2)
    program = fxshard.parallelize(model, data_parallel(4), (ids,))
    with pytest.raises(IndexError):
        fxshard.simulate(program, ids + 2)
    torch.testing.assert_close(fxshard.simulate(program, ids).outputs[3], model(ids))


def test_a_dynamic_size_that_does_not_divide_is_captured_for_itself() -> None:
    """Uneven parts have static sizes: one capture serves all sizes that divide, another each size that does not."""
    model = nn.Sequential(nn.Linear(8, 8)).double()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = fxshard.parallelize(model, data_parallel(4), (X,), dynamic_shapes=({0: batch},))
    for count in (6, 4, 7, 8, 2, 12, 7):
        x = torch.randn(count, 6, 8, dtype=torch.float64)
        for output in fxshard.simulate(program, x).outputs:
            torch.testing.assert_close(output, model(x))
    assert len(program._captures.all) == 1 + 3


# --- looking --------------------------------------------------------------------------------------------------------


@each_plan
def test_every_view_of_a_program(plan: Plan) -> None:
    program = fxshard.parallelize(net(), plan, (X,))
    for stage in STAGES:
        assert program.graph_after(stage).nodes
    with pytest.raises(ValueError, match="there is no stage"):
        program.graph_after("nothing")
    assert "linear" in program.graph_module.code
    table = io.StringIO()
    program.print_tabular(file=table)
    lines = table.getvalue().splitlines()
    assert lines[0].split()[0] == "op"
    communicates = {c.kind for c in program.collectives()}
    assert communicates <= {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
    for kind in {c.kind for c in program.collectives() if c.phase == "forward"}:
        assert kind in table.getvalue()
        assert kind in program.code()
        assert kind in program.explain()
    for rank in range(program.mesh.world_size):
        compile(program.code(rank), "code", "exec")


def test_a_table_and_the_list_agree_on_bytes() -> None:
    program = fxshard.parallelize(net(), tensor_parallel(2), (X,))
    forward, backward = ([c for c in program.collectives() if c.phase == p] for p in ("forward", "backward"))
    assert [(c.kind, c.num_bytes) for c in forward] == [("all_reduce", 4 * 6 * 8 * 8)]
    assert not backward, "x needs no gradient"


def test_verify_leaves_everything_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    program = fxshard.parallelize(net(), data_parallel(2) | tensor_parallel(2), (X,))
    before = copy.deepcopy(program.full_state_dict())
    state = torch.get_rng_state()
    report = fxshard.verify(program, X)
    assert report.ok, report
    assert report.first_divergence is None
    assert report.max_output_error < 1e-10
    assert report.max_grad_error < 1e-10
    assert "the program equals the model" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.full_state_dict().items())
    assert all(p.grad is None for r in range(4) for p in program.rank_module(r).parameters())


def test_verify_compares_with_the_programs_own_weights() -> None:
    program = fxshard.parallelize(net(), Plan({"tp": 2}, params={"up.weight": Shard(0)}), (X,))
    with torch.no_grad():
        for rank in range(2):
            program.rank_module(rank).up.weight.mul_(3)
    assert fxshard.verify(program, X).ok


class Sized(nn.Module):
    """Makes a constant of a size of its input, which export lifts out of the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([float(x.shape[0]), 1.0])


def test_each_capture_has_constants_of_its_own() -> None:
    model = Sized()
    program = fxshard.parallelize(model, fxshard.data_parallel(1))
    for size in (3, 5, 3, 4, 5):
        assert torch.equal(program(torch.ones(size, 2)), model(torch.ones(size, 2)))


def test_ranks_are_made_when_they_are_asked_for_with_the_weights_of_the_first_capture() -> None:
    """A mesh of many ranks costs what one of few does; what the model becomes later, no rank sees."""
    model = net().eval()
    before = copy.deepcopy(model)
    program = fxshard.parallelize(model, data_parallel(512) | tensor_parallel(8), (X.repeat(128, 1, 1),))
    assert program.mesh.world_size == 4096
    assert list(program.ranks_made) == [0]

    small = fxshard.parallelize(model, data_parallel(2) | tensor_parallel(2), (X,))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    model.up.weight.requires_grad_(False)
    assert list(small.ranks_made) == [0]
    run = fxshard.simulate(small, X)
    assert torch.equal(run.outputs[3]["y"], run.outputs[0]["y"])
    torch.testing.assert_close(run.outputs[0]["y"], before(X)["y"])
    assert all(small.rank_module(rank).get_parameter("up.weight").requires_grad for rank in range(4))


def test_tab_completion_shows_what_users_call() -> None:
    program = fxshard.parallelize(net(), tensor_parallel(2), (X,))
    shown = set(dir(program))
    assert {"code", "explain", "plan", "mesh", "rank_module", "full_state_dict", "parameters", "train"} <= shown
    assert {"up", "norm", "calls"} <= shown, "what the model has"
    assert not shown & {"compile_call", "place_constants", "register_forward_hook", "half", "T_destination"}
    assert not any(name.startswith("_") for name in shown)
    for name in shown:
        getattr(program, name)
    assert "up" in dir(fxshard.parallelize(net(), tensor_parallel(2))), "before the capture, too"
    columns = fxshard.parallelize(nn.Linear(8, 8).double(), {"weight": Shard(0)}, (X,), mesh={"tp": 2})
    assert columns.output_placements(0) == (Replicate(),), "outputs are whole unless the plan says otherwise"


@pytest.mark.parametrize("simulated_before", [False, True])
def test_what_is_done_to_one_ranks_weights_is_noticed(simulated_before: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    if simulated_before:
        fxshard.simulate(program, X)
    with torch.no_grad():
        program.get_parameter("0.weight").mul_(2)
    with pytest.raises(InputError, match=r"the ranks differ: 0\.weight"):
        fxshard.simulate(program, X)


def test_freezing_a_program_freezes_ranks_that_are_not_made_yet() -> None:
    program = fxshard.parallelize(net().eval(), tensor_parallel(2), (X,))
    program.requires_grad_(False)
    assert not any(p.requires_grad for rank in range(2) for p in program.rank_module(rank).parameters())
