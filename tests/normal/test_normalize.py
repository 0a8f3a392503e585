"""The normal form computes what the model computes: outputs, gradients and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxshard.capture.capture import capture
from fxshard.ir.origins import module_of, source_of
from fxshard.normal.functionalize import is_mutating
from fxshard.normal.normalize import normalize

torch.set_num_threads(1)
Tensor = torch.Tensor


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def outcome(model: nn.Module, call: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Run once; return the leaves and the tree of outputs, gradients and buffers."""
    torch.manual_seed(0)
    out = call(**kwargs)
    results = [r for r in pytree.tree_leaves(out) if isinstance(r, Tensor) and r.requires_grad]
    loss = sum((r * torch.linspace(0, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    if isinstance(loss, Tensor):
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return pytree.tree_flatten((out, grads, dict(model.named_buffers())))


def check(model: nn.Module, kwargs: dict[str, Any], **options: Any) -> fx.GraphModule:
    """Compare eager with the captured and the normalized graph, in double precision; return the latter."""
    model = model.double()
    double = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, kwargs)
    runs = []
    gm = None
    for stage in (lambda gm: gm, normalize):
        own = copy.deepcopy(model)
        captured = capture(own, (), double, **options)
        gm = stage(captured.root)
        gm.graph.lint()
        assert stage is not normalize or all("val" in n.meta for n in gm.graph.nodes if n.op != "output")

        def call(gm: fx.GraphModule = gm, captured: Any = captured, **kw: Any) -> Any:
            return captured.unflatten_outputs(gm(*captured.flatten_inputs((), kw)))

        runs.append(outcome(own, call, double))
    expected, tree = outcome(model, model, double)  # after capture: it teaches pytree the model's types
    for leaves, got_tree in runs:
        assert got_tree == tree
        for want, got in zip(expected, leaves, strict=True):
            torch.testing.assert_close(got, want) if isinstance(want, Tensor) else None
            assert type(got) is type(want)
    assert gm is not None
    return gm


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(t: Any, ids: Tensor) -> Any:
    config = t.LlamaConfig(**SIZES, vocab_size=20, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return t.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2(t: Any, ids: Tensor) -> Any:
    config = t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16, bos_token_id=1, eos_token_id=2)
    config.loss_type = "ForCausalLM"
    return t.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def bert(t: Any, ids: Tensor) -> Any:
    model = t.BertModel(t.BertConfig(**SIZES, vocab_size=20, max_position_embeddings=16))
    return model, {"input_ids": ids, "attention_mask": (ids > 3).long()}


def vit(t: Any, ids: Tensor) -> Any:
    return t.ViTModel(t.ViTConfig(**SIZES, image_size=8, patch_size=4)), {"pixel_values": torch.randn(2, 3, 8, 8)}


def t5(t: Any, ids: Tensor) -> Any:
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=20, **ends)
    return t.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}


@pytest.mark.thin(2)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("build", [llama, gpt2, bert, vit, t5], ids=lambda build: build.__name__)
def test_transformers(build: Any, training: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model, kwargs = build(transformers, torch.randint(2, 20, (2, 6)))
    gm = check(model.train(training), kwargs)
    assert not [op for op in ops(gm) if "assert" in op or "wrap_with" in op]
    assert not [n for n in gm.graph.nodes if n.op == "call_function" and is_mutating(n.target)]
    linears = [n for n in gm.graph.nodes if str(n.target) == "aten.linear.default"]
    assert all(len(n.args) == 2 and module_of(n) and source_of(n) for n in linears)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norm_and_in_place_activations(training: bool) -> None:
    block = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True)]
    model = nn.Sequential(*block, nn.Flatten(), nn.Linear(16, 2)).train(training)
    gm = check(model, {"input": torch.randn(2, 3, 4, 4)})
    assert ("copy_.default" in ops(gm)) is training
    assert "batch_norm.default" in ops(gm)


class Fn(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.linear = nn.Linear(4, 4)
        self.register_buffer("buf", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.fn(self, x)


X = torch.linspace(-1, 1, 12).view(3, 4)


def test_regions_without_gradient() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        y = m.linear(x)
        with torch.no_grad():
            a = y * m.linear.weight[0]
            b = m.linear(a) + m.buf
            with torch.enable_grad():
                c = (y * a).sum()
            d = c * 2
        return y * a + b * m.linear.bias, c, d, x * 1

    gm = check(Fn(fn), {"x": X})
    assert "detach.default" in ops(gm)
    assert not any("wrap" in op for op in ops(gm))


def test_a_region_of_constants_needs_no_detach() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        with torch.no_grad():
            table = m.buf * torch.arange(4.0)
        return x * table

    assert "detach.default" not in ops(check(Fn(fn), {"x": X}))


def test_bias_becomes_an_addition() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        product = torch.addmm(m.linear.bias, x, m.linear.weight)
        scaled = torch.addmm(m.linear.bias, x, m.linear.weight, beta=2)
        return m.linear(x) + product + scaled + torch.nn.functional.linear(x, m.linear.weight)

    gm = check(Fn(fn), {"x": X})
    assert ops(gm).count("addmm.default") == 1
    assert ops(gm).count("linear.default") == 2
    split = [n for n in gm.graph.nodes if n.meta.get("split_bias")]
    assert [str(n.args[0].target) for n in split] == ["aten.mm.default", "aten.linear.default"]
    assert module_of(split[1]) == module_of(split[1].args[0]) == "linear"


def test_identities_go_and_near_identities_stay() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        y = x.to(torch.float64).view(3, 4).expand(3, -1)[:].reshape(3, 4).squeeze(0).double().flatten(1)
        y = torch.nn.functional.dropout(y, 0.0, training=True)
        y = torch.nn.functional.dropout(y, 0.5, training=False)
        return y * 2, y.to(torch.float64, copy=True), y.to(torch.float32), y[1:], y.view(4, 3)

    found = ops(check(Fn(fn), {"x": X}))
    kept = ["mul.Tensor", "to.dtype", "to.dtype", "slice.Tensor", "view.default"]
    assert found == kept


def test_dead_nodes_go_but_random_draws_stay() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        x.sin().cos()
        torch.rand(3)
        m.linear(x)
        return x + torch.rand(3, 4)

    gm = check(Fn(fn), {"x": X})
    assert ops(gm) == ["rand.default", "rand.default", "add.Tensor"]
    assert [n.name for n in gm.graph.nodes if n.op in ("get_attr", "placeholder")] == ["x"]


def test_checkpointed_block() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        return checkpoint(lambda y: m.linear(y).relu(), x, use_reentrant=False)

    assert "relu.default" in ops(check(Fn(fn), {"x": X.clone()}))


def test_gradient_is_off_where_the_model_turned_it_off() -> None:
    def fn(m: Fn, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            y = m.linear(x.float())
        with torch.no_grad(), torch.enable_grad():
            z = m.linear(x)
        return x.float() * y, z

    out = normalize(capture(Fn(fn), (X,)).root)(X)
    assert not out[0].requires_grad
    assert out[1].requires_grad


def test_dynamic_batch_and_sequence() -> None:
    transformers = pytest.importorskip("transformers")
    model, kwargs = llama(transformers, torch.randint(2, 20, (2, 6)))
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=64)}
    captured = capture(model, (), kwargs, dynamic_shapes={"input_ids": dims, "labels": dims})
    gm = normalize(captured.root)
    ids = torch.randint(2, 20, (3, 9))
    got = captured.unflatten_outputs(gm(*captured.flatten_inputs((ids,), {"labels": ids})))
    expected = model(ids, labels=ids)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.logits, expected.logits)


def test_meta_device() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model, kwargs = gpt2(transformers, torch.randint(2, 20, (2, 6)))
    gm = normalize(capture(model, (), kwargs).root)
    assert all(p.is_meta for p in gm.parameters())
    assert gm(*kwargs.values())[1].shape == (2, 6, 20)


def test_the_input_is_unchanged_and_parameters_are_shared() -> None:
    model = Fn(lambda m, x: m.linear(x) + m.buf)
    captured = capture(model, (X,))
    text = str(captured.root.graph)
    gm = normalize(captured.root)
    assert str(captured.root.graph) == text
    assert not any(n.meta.get("split_bias") for n in captured.root.graph.nodes)
    assert gm.get_parameter("linear.weight") is model.linear.weight
    assert "buf" not in gm.state_dict()
    assert str(normalize(gm).graph) == str(gm.graph)
