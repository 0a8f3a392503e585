"""What ranks run to show that ``torch.compile`` and ``torch.export`` over a program compute what the model computes."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.export import Dim

import fxshard
from fxshard.errors import CaptureError, InputError
from tests.distributed.ranks import Statistics
from tests.helpers import Result as Found
from tests.helpers import problems_of, run_original, tensors_of, weighted_loss
from tests.models.zoo import build, dynamic, ids, sized
from tests.presets import preset

TOLERANCE = 2e-4
COUNTERS = torch._dynamo.utils.counters


class Block(nn.Module):
    """A norm, a pair, a residual; dicts and keywords in, dicts out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor | None = None) -> dict[str, Any]:
        x = batch["x"]
        y = x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))
        return {"y": y if scale is None else y * scale, "parts": [y.sum(), None]}


def block(rows: int = 4, dropout: float = 0.0) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    inputs = {"batch": {"x": torch.randn(rows, 6, 8)}, "scale": torch.full((8,), 0.5)}
    return Block(dropout), inputs


def make(name: str, training: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    if name == "block":
        return block()
    changes = {"attention_dropout": 0.0} if name == "llama" else dict.fromkeys(("resid_pdrop", "embd_pdrop"), 0.0)
    changes |= {"attn_pdrop": 0.0} if name == "gpt2" else {}
    model, inputs = build(name, torch.float32, training, **changes)
    return model, {**inputs, "use_cache": False}


@contextlib.contextmanager
def graphs() -> Iterator[Counter[str]]:
    """Counts what dynamo makes: ``graphs``, and ``breaks`` of them."""
    torch._dynamo.reset()
    COUNTERS.clear()
    found: Counter[str] = Counter()
    yield found
    found["graphs"] = COUNTERS["stats"]["unique_graphs"]
    found["breaks"] = sum(COUNTERS["graph_break"].values())


def run_compiled(program: fxshard.ParallelModule, compiled: Any, inputs: dict[str, Any]) -> Found:
    """One forward and backward pass of this rank."""
    program.zero_grad(set_to_none=True)
    output = compiled(**inputs)
    loss = weighted_loss(output)
    loss.backward()
    outputs = {path: tensor.detach().clone() for path, tensor in tensors_of(output)}
    return Found([outputs], program.full_grads(), [type(output)], loss=loss.item())


def equal_the_original(cases: list[tuple[str, str]], backend: str, **options: Any) -> None:
    """Outputs and whole gradients of (model, plan) pairs; one graph with gradients, one without."""
    for name, plan in cases:
        model, inputs = make(name)
        program = fxshard.parallelize(model, preset(plan), (), inputs, **options)
        with graphs() as made:
            compiled = torch.compile(program, backend=backend, fullgraph=True)
            expected = run_original(model, (), inputs)
            for _ in range(2):
                problems = problems_of(run_compiled(program, compiled, inputs), expected, TOLERANCE)
                assert not problems, "\n".join([f"{name} under {plan}:", *problems[:10]])
            with torch.no_grad():
                outputs = dict(tensors_of(compiled(**inputs)))
        for path, want in tensors_of(model(**inputs)):
            torch.testing.assert_close(outputs[path], want, rtol=1e-4, atol=1e-5)
        assert made == {"graphs": 2, "breaks": 0}


def inputs_get_gradients(backend: str) -> None:
    """An input that requires a gradient gets the whole one, as eagerly; so does a frozen weight that is no more so."""
    for plan in ("tp2", "dp2", "sp2"):
        model, inputs = block()
        x = inputs["batch"]["x"].requires_grad_()
        model.norm.weight.requires_grad_(False)
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        grads = []
        for frozen in (True, False):
            program.get_parameter("norm.weight").requires_grad_(not frozen)
            model.norm.weight.requires_grad_(not frozen)
            for call in (compiled, model):
                x.grad = None
                program.zero_grad()
                model.zero_grad()
                weighted_loss(call(**inputs)).backward()
                whole = program.full_grads() if call is compiled else {n: p.grad for n, p in model.named_parameters()}
                grads.append({n: g for n, g in whole.items() if g is not None} | {"x": x.grad})
            torch.testing.assert_close(*grads[-2:], rtol=1e-4, atol=1e-6)
        assert "norm.weight" in grads[-2]


def many_sizes(cases: list[tuple[str, str]], backend: str) -> None:
    """Batch and length symbolic: one graph for all sizes that divide; another one runs eagerly, and then compiled."""
    for name, plan in cases:
        if name == "block":
            model, inputs = block()
            shapes: Any = {"batch": {"x": {0: Dim("rows", min=2, max=64)}}, "scale": None}
            calls = [block(rows)[1] for rows in (4, 8, 6, 32)]
        else:
            model, inputs = make(name)
            shapes = {**dynamic(name), "use_cache": None}
            calls = [{**sized(name, *size), "use_cache": False} for size in ((4, 16), (8, 24), (6, 32))]
        program = fxshard.parallelize(model, preset(plan), (), inputs, dynamic_shapes=shapes)
        with graphs() as made:
            compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=True)
            for call in calls:
                problems = problems_of(run_compiled(program, compiled, call), run_original(model, (), call), TOLERANCE)
                assert not problems, "\n".join([f"{name} under {plan}:", *problems[:10]])
        assert made == {"graphs": 1, "breaks": 0}
    model, inputs = block()
    shapes = {"batch": {"x": {0: Dim("rows", min=2, max=64)}}, "scale": None}
    program = fxshard.parallelize(model, preset("dp2"), (), inputs, dynamic_shapes=shapes)
    compiled = torch.compile(program, backend=backend, dynamic=True)
    for rows in (4, 3, 3, 5, 6):  # of three rows and of five each is a capture of its own, of uneven parts
        call = block(rows)[1]
        assert not problems_of(run_compiled(program, compiled, call), run_original(model, (), call), TOLERANCE)
    with pytest.raises(InputError, match="dim 0 is 65, outside of its range 2 to 64"):
        compiled(**block(65)[1])


def inside_of_other_code(backend: str) -> None:
    """A compiled function that calls the program; ``program.compile()``; other keyword orders."""
    model, inputs = block()
    program = fxshard.parallelize(model, preset("dp2"), (), inputs)

    @torch.compile(backend=backend, fullgraph=True)
    def step(batch: dict[str, torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        return program(scale=scale, batch=batch)["y"].square().mean()

    loss = step(**inputs)
    loss.backward()
    expected = run_original(model, (), inputs, loss=lambda out: out["y"].square().mean())
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
    grads = program.full_grads()
    for name, want in expected.grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-4, atol=1e-5)
    program.compile(backend=backend, fullgraph=True)
    with graphs() as made:
        assert not problems_of(run_compiled(program, program, inputs), run_original(model, (), inputs), TOLERANCE)
    assert made == {"graphs": 1, "breaks": 0}


def refused(compiled: Any, inputs: dict[str, Any], reason: str) -> None:
    """With ``fullgraph=True`` torch says why there is no graph."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        compiled(**inputs)


def run_eagerly_where_it_must(backend: str) -> None:
    """What cannot be traced is computed all the same, and with ``fullgraph=True`` refused by its reason."""
    uneven = fxshard.data_parallel(2), block(3), "differ in size", {}
    drawing = fxshard.data_parallel(2), block(dropout=0.5), "draws random numbers", {}
    comparing = fxshard.data_parallel(2), block(), "compares the ranks", {"compare": "every_call"}
    for plan, (model, inputs), reason, options in (uneven, drawing, comparing):
        program = fxshard.parallelize(model, plan, (), inputs, **options)
        with graphs():
            refused(torch.compile(program, backend=backend, fullgraph=True), inputs, reason)
        with graphs() as made:
            compiled = torch.compile(program, backend=backend)
            torch.manual_seed(7)
            found = run_compiled(program, compiled, inputs)
        assert made["breaks"]
        assert not problems_of(found, run_original(model, (), inputs, seed=7), TOLERANCE)

    model, inputs = block()
    lazy = fxshard.parallelize(model, fxshard.data_parallel(2))
    with graphs():
        refused(torch.compile(lazy, backend=backend, fullgraph=True), inputs, "given example inputs")
    assert not problems_of(
        run_compiled(lazy, torch.compile(lazy, backend=backend), inputs), run_original(model, (), inputs), TOLERANCE
    )


def a_new_mode(backend: str) -> None:
    """``eval()`` is another capture: the first call makes it, eagerly, the next one is compiled."""
    model, inputs = block(dropout=0.5)
    program = fxshard.parallelize(model.eval(), fxshard.data_parallel(2), (), inputs)
    with graphs() as made:
        compiled = torch.compile(program, backend=backend)
        compiled(**inputs)
        assert isinstance(compiled.train()(**inputs)["y"], torch.Tensor)
        compiled.eval()(**inputs)
    assert made["breaks"]
    model, inputs = block()
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (), inputs)
    program.eval()
    with graphs():
        refused(torch.compile(program, backend=backend, fullgraph=True), inputs, "has not captured such inputs")
    with graphs() as made:
        compiled = torch.compile(program, backend=backend)
        compiled(**inputs)
        COUNTERS.clear()
        compiled(**inputs)
    assert made == {"graphs": 1, "breaks": 0}


def wait_with_the_sums(backend: str) -> None:
    """Within ``no_sync`` a compiled program runs eagerly; what waits cannot be mixed with compiled sums."""
    model, inputs = block()
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (), inputs)
    with graphs(), program.no_sync():
        refused(torch.compile(program, backend=backend, fullgraph=True), inputs, "within no_sync")
    with graphs():
        compiled = torch.compile(program, backend=backend)
        compiled(**inputs)
        with program.no_sync():
            weighted_loss(compiled(**inputs)).backward()
        with pytest.raises(fxshard.errors.DistributedError, match="gradient of no_sync waits"):
            weighted_loss(compiled(**inputs)).backward()


@contextlib.contextmanager
def collectives_of_the_passes() -> Iterator[tuple[Any, dict[str, Counter[str]]]]:
    """A backend that runs the graphs as they are, and the collectives of the ``forward`` and ``backward`` graph."""
    found: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def counting(phase: str) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            targets = [node.target for node in graph.graph.nodes if "c10d_functional" in str(node.target)]
            found[phase].update(str(t).split(".")[-2] for t in targets if "wait_tensor" not in str(t))
            return make_boxed_func(graph)

        return compile_graph

    yield (
        aot_autograd(
            fw_compiler=counting("forward"),
            bw_compiler=counting("backward"),
            partition_fn=min_cut_rematerialization_partition,
        ),
        found,
    )


def what_the_graphs_communicate() -> None:
    """Gradients are summed in buckets, gathered weights are gathered again, as the program is asked to."""
    gathered = {"all_gather_into_tensor": 1, "all_reduce": 1}  # the outputs
    weights = {"all_gather_into_tensor": 7, "all_reduce": 1}
    cases: list[tuple[str, dict[str, Any], dict[str, int], dict[str, int]]] = [
        ("tp2", {}, {"all_reduce": 1}, {"all_reduce": 1}),
        ("dp2", {}, gathered, {"all_reduce": 1}),
        ("dp2", {"bucket_bytes": 0}, gathered, {"all_reduce": 6}),
        ("dp2", {"bucket_bytes": 700}, gathered, {"all_reduce": 2}),
        ("zero2", {"regather": False}, weights, {"reduce_scatter_tensor": 6}),
        ("zero2", {}, weights, {"reduce_scatter_tensor": 6, "all_gather_into_tensor": 4}),  # two biases go unread there
    ]
    for plan, options, forward, backward in cases:
        model, inputs = block()
        program = fxshard.parallelize(model, preset(plan), (), inputs, **options)
        with graphs(), collectives_of_the_passes() as (backend, found):
            run_compiled(program, torch.compile(program, backend=backend, fullgraph=True), inputs)
        assert found == {"forward": forward, "backward": backward}, (plan, options, found)


def checkpointed(plan: str) -> None:
    """Layers that are computed anew in the backward pass."""
    equal_the_original([("llama", plan)], "inductor", checkpoint="model.layers.*")


def train(cases: list[tuple[str, str]], backend: str, steps: int = 4) -> None:
    """AdamW, a new batch a step, in training mode: losses and final weights are those of one device."""
    for name, plan in cases:
        model, inputs = make(name, training=True)
        batches = [inputs | {"input_ids": ids(seed=100 + step)} for step in range(steps)]
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        torch._dynamo.reset()
        losses: list[list[float]] = []
        for trained, call in ((program, torch.compile(program, backend=backend, fullgraph=True)), (model, model)):
            optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
            losses.append([])
            for batch in batches:
                optimizer.zero_grad()
                logits = call(**batch).logits
                target = batch["input_ids"][:, 1:].flatten()
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target)
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)
        assert losses[0][-1] != losses[0][0]
        state = program.full_state_dict()
        for weight, want in model.state_dict().items():
            torch.testing.assert_close(state[weight], want, rtol=0, atol=2e-4)


def exported() -> None:
    """A rank's program through ``torch.export``: it computes the same, saved and loaded, and has no gradient."""
    for plan in ("tp2", "dp2", "sp2", "zero2"):
        model, inputs = block()
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        want = model(**inputs)["y"]
        for strict in (False, True):
            made = torch.export.export(program, (), inputs, strict=strict)
            found = made.module()(**inputs)["y"]
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
            assert not found.requires_grad
            assert {tuple(t.shape) for t in made.state_dict.values()} == {tuple(p.shape) for p in program.parameters()}
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(made, f"{folder}/rank.pt2")
            again = torch.export.load(f"{folder}/rank.pt2").module()
        torch.testing.assert_close(again(**inputs)["y"], want, rtol=1e-5, atol=1e-5)
        weighted_loss(program(**inputs)).backward()
    model, inputs = block(3)
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (), inputs)
    with pytest.raises(CaptureError, match="cannot be exported: the ranks' parts differ in size"):
        torch.export.export(program, (), inputs)


def packaged(cases: list[tuple[str, str]]) -> None:
    """A rank's program through AOTInductor."""
    for name, plan in cases:
        model, inputs = make(name)
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        with torch.no_grad():
            made = torch.export.export(program, (), inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = torch._inductor.aoti_compile_and_package(made, package_path=f"{folder}/rank{dist.get_rank()}.pt2")
            outputs = dict(tensors_of(torch._inductor.aoti_load_package(path)(**inputs)))
        for path, want in tensors_of(model(**inputs)):
            torch.testing.assert_close(outputs[path], want, rtol=1e-4, atol=1e-5)


def buffers(backend: str) -> None:
    """The running statistics of a batch norm over a split batch: buffers that change in the graph."""
    model, x = Statistics(), torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (x,))
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    for _ in range(3):
        expected, found = model(x), compiled(x)
        for made, want in zip(found, expected, strict=True):
            torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-4)
        for trained, outputs in ((model, expected), (program, found)):
            trained.zero_grad(set_to_none=True)
            weighted_loss(outputs).backward()
    grads = program.full_grads()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-4)
    for name, want in model.named_buffers():
        torch.testing.assert_close(program.full_state_dict()[name], want, rtol=1e-5, atol=1e-6)
