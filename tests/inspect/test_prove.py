"""Every rule of the table, proven on sample calls; and wrong rules, which the prover must refute."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxshard.errors import RuleError
from fxshard.inspect.prove import Sample, check_rule
from fxshard.lowerings.writer import Writer
from fxshard.passes import localize
from fxshard.rules.names import left
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import At, Call, Factor, Recipe
from fxshard.rules.table import all_rules, find_rule, temporary_rule
from fxshard.runtime import collectives
from fxshard.torch_internals import pytree
from tests.rules.samples import all_samples, ints, overload, pos, r

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*degrees of freedom.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*non-contiguous.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*size_average and reduce args.*:UserWarning"),
]

SAMPLES = all_samples()
ROWS: dict[str, list[str]] = defaultdict(list)
"""The name of a rule -> the overloads of its samples."""
for _name in SAMPLES:
    _rule = find_rule(overload(_name))
    ROWS[_rule.name if _rule else _name].append(_name)

GONE = ("cholesky",)  # since 2.14
# Rules whose factors are plain dims: 2 and 4 ranks say no more than 3, and three axes no more than two.
PLAIN = re.compile(r"@(pointwise|elementwise|dim_whole|scan|reduces|sums|counts|fft|cast)")


@pytest.mark.parametrize("name", sorted(name for name, rule in all_rules().items() if not rule.whole))
def test_every_rule_is_of_an_operator_and_has_samples(name: str) -> None:
    library, packet = name.split(".")[:2]
    if packet in GONE and not hasattr(torch.ops.aten, packet):
        pytest.skip("this torch has it no more")
    if library != "aten" and not ROWS[name]:
        pytest.skip(f"{library} is not installed")
    assert getattr(getattr(torch.ops, library), packet).overloads()
    assert ROWS[name], f"tests/rules/samples.py has no call of {name}"
    assert any(SAMPLES[overload_name]() for overload_name in ROWS[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_rule(name: str) -> None:
    """Every factor, on 3 ranks, in blocks, forward and backward; every linear set; what is not read."""
    rule = find_rule(overload(name))
    assert rule is not None
    proof = check_rule(overload(name), SAMPLES[name](), meshes=((3,),))
    assert not proof.untried, "no sample can be split along these factors"


@pytest.mark.slow
@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", SAMPLES)
def test_rule_on_more_ranks(name: str) -> None:
    """Two and four ranks, and two and three axes at once, which nest where they split one dim."""
    rule = find_rule(overload(name))
    assert rule is not None
    meshes = ((2, 2), (3, 2)) if PLAIN.match(rule.text) else ((2,), (4,), (3, 2), (2, 2, 2))
    check_rule(overload(name), SAMPLES[name](), meshes=meshes)


@pytest.mark.parametrize("name", SAMPLES)
def test_rule_of_scalars(name: str) -> None:
    """Operands without dims: an operator that takes them has a rule that does."""
    sample = SAMPLES[name]()[0]
    sample = sample if isinstance(sample, Sample) else Sample(sample)
    for dim in (None, 0, -1):
        args = pytree.tree_map(lambda value, dim=dim: _scalar(value, dim), sample.args)
        try:
            overload(name)(*args, **sample.kwargs)
        except (RuntimeError, IndexError, ValueError, NotImplementedError, TypeError):
            continue  # it takes none
        check_rule(overload(name), [replace(sample, args=args, gradients=False)], meshes=((2,),))


def _scalar(value: Any, dim: int | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.flatten()[:1].reshape(()) if value.numel() else value
    return dim if dim is not None and type(value) is int else value


def test_split_in_blocks_of_a_packed_projection_is_tried() -> None:
    proof = check_rule(torch.ops.aten.chunk.default, [(r(4, 24), 2, 1)])
    assert proof.factors == {"d0", "block"}


# --- wrong rules -----------------------------------------------------------------------------------------------------

aten = torch.ops.aten


def _whole_groups(call: Call) -> Recipe:
    """group_norm that splits the channels, and leaves ``num_groups`` as it was."""
    ins = [[("b",), ("g",), ("s",)]]
    return Recipe(make_factors(ins, ins, call, {"s": "!"}))


def _reads_nothing(call: Call) -> Recipe:
    return Recipe(unread=frozenset({0}))


def _blocks(call: Call) -> Recipe:
    """A view that cuts one block where it should cut three."""
    return Recipe((Factor("f", 8, (At(1),), (At(2),)),))


def _pointwise(call: Call) -> Recipe:
    names = left(len(call.inputs[0]))
    return Recipe(make_factors([names] * len(call.inputs), [names], call, {}))


def x() -> torch.Tensor:
    return r(12, 24)


# operator, arguments, rule, linear sets, what the error says
WRONG: dict[str, tuple[Any, tuple[Any, ...], Any, str, str]] = {
    "softmax, a dropped !": (aten.softmax.int, (x(), -1), "... d -> ... d", "", "split over 'd', 2 ranks"),
    "cumsum, a dropped !": (aten.cumsum.default, (x(), 0), "c d -> c d", "", "split over 'c'"),
    "sort, a dropped !": (aten.sort.default, (x(), 1), "c d -> c d, c d", "", "split over 'd'"),
    "layer_norm, a dropped !": (aten.layer_norm.default, (x(), [24]), "n d -> n d", "", "split over 'd'"),
    "attention, keys split": (
        aten.scaled_dot_product_attention.default,
        (r(2, 6, 4), r(2, 12, 4), r(2, 12, 4)),
        "b q d!, b s+ d!, b s+ e -> b q e",
        "",
        "split over 's'",
    ),
    "causal attention, queries split": (
        aten.scaled_dot_product_attention.default,
        (r(2, 12, 4), r(2, 12, 4), r(2, 12, 4), None, 0.0, True),
        "b q d!, b s! d!, b s! e -> b q e",
        "",
        "split over 'q'",
    ),
    "max sums": (aten.amax.default, (x(), [1]), "n d+ -> n", "", "result 0 differs"),
    "mean sums": (aten.mean.dim, (x(), [1]), "n d+ -> n", "", "result 0 differs"),
    "mean is linear, not its variance": (aten.var.dim, (x(), [1]), "n d! -> n", "0", "partial operands"),
    "loss mean sums": (aten.mse_loss.default, (x(), x()), "n+ d+, n+ d+ ->", "", "result 0 differs"),
    "cross entropy by local counts": (
        aten.cross_entropy_loss.default, (x(), ints(24, 12)), "n+ v!, n+ ->", "", "split over 'n'",
    ),
    "product that does not sum": (aten.mm.default, (r(12, 12), r(12, 12)), "m k, k n -> m k", "", "is wrong"),
    "product, dims exchanged": (aten.mm.default, (r(12, 12), r(12, 12)), "m k+, k+ n -> n m", "", "is wrong"),
    "transposed, dims kept": (aten.t.default, (r(12, 12),), "a b -> a b", "0", "result 0 has the shape"),
    "mT reverses all dims": (aten.mT.default, (r(12, 12, 12),), "@reverse", "", "is wrong"),
    "bias added by every rank": (
        aten.linear.default, (r(12, 24), r(6, 24), r(6)), "n i+, o i+, o -> n o", "", "split over 'i'",
    ),
    "embedding without its lowering": (aten.embedding.default, (r(24, 6), ints(24, 12)), "v+ e, n -> n e", "", "'v'"),
    "group_norm without its lowering": (aten.group_norm.default, (r(4, 24, 5), 12), _whole_groups, "", "'g'"),
    "view with the wrong factor": (aten.view.default, (x(), [12, 3, 8]), _blocks, "", "split over 'f'"),
    "flattened on the minor dim": (aten.flatten.using_ints, (r(6, 4),), "a b -> (b a)", "", "split over 'b'"),
    "split dim selected": (aten.select.int, (r(12, 12), 0, 1), "a b -> a", "", "split over 'a'"),
    "gather by local positions": (aten.gather.default, (x(), 1, ints(24, 12, 24)), "n g, n g -> n g", "", "'g'"),
    "roll, a dropped !": (aten.roll.default, (x(), [1], [1]), "n d -> n d", "0", "split over 'd'"),
    "draws differ": (aten.cummax.default, (x(), 1), "n d -> n d, n d", "", "split over 'd'"),
    "relu is not linear": (aten.relu.default, (x(),), "... -> ...", "0", "split over partial operands"),
    "exp is not linear": (aten.exp.default, (x(),), "@pointwise", "0", "split over partial operands"),
    "mul in both at once": (aten.mul.Tensor, (x(), x()), "@pointwise", "0,1", "split over partial operands"),
    "add in one operand": (aten.add.Tensor, (x(), x()), "@pointwise", "0", "split over partial operands"),
    "div in the divisor": (aten.div.Tensor, (pos(12), pos(12)), "@pointwise", "1", "split over partial operands"),
    "masked_fill with a one": (
        aten.masked_fill.Scalar, (x(), torch.arange(24) < 5, 1.0), "@pointwise", "0", "partial operands",
    ),
    "values that are read": (aten.neg.default, (x(),), _reads_nothing, "", "whole operands"),
    "broadcast operand cut": (aten.add.Tensor, (r(12, 12), r(12)), "a b, a -> a b", "", "split over 'a'"),
    "groups of rows, cut elsewhere": (
        aten._grouped_mm.default,
        (r(24, 48).float(), r(4, 48, 96).float(), torch.tensor([5, 5, 11, 24], dtype=torch.int32)),
        "s k!, e! k! n, e! -> s n", "", "split over 's'",
    ),
    "histc between borders of its own": (aten.histc.default, (r(24), 6), "n+ -> b", "", "split over 'n'"),
    "gru, states split": (
        aten.gru_cell.default, (r(4, 6), r(4, 12), r(36, 6), r(36, 12)), "b! i!, b! h, g! i!, g! h -> b! h", "", "'h'",
    ),
    "a result too few": (aten.chunk.default, (x(), 2), "... -> ...", "", "operands and"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_refuted(what: str) -> None:
    operator, args, rule, linear, message = WRONG[what]
    with pytest.raises(RuleError, match=re.escape(message)):
        check_rule(operator, [args], rule, linear=linear)
    assert find_rule(operator) is all_rules().get(find_rule(operator).name)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "lowering",
    [
        *("mean", "softmax", "loss", "embedding", "dropout", "groups", "share", "attention"),
        *("norm", "reduction", "extreme", "position", "cumsum", "experts", "picked", "added", "ring"),
    ],
)
def test_a_lowering_that_does_nothing_is_refuted(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules' lowerings are needed: the call as it stands would be wrong on a part."""
    operator, args = {
        "mean": (aten.mean.dim, (x(), [1])),
        "softmax": (aten.softmax.int, (x(), 1)),
        "loss": (aten.cross_entropy_loss.default, (x(), ints(24, 12))),
        "embedding": (aten.embedding.default, (r(24, 6), ints(24, 12))),
        "dropout": (aten.dropout.default, (x(), 0.5, True)),
        "groups": (aten.group_norm.default, (r(4, 24, 5), 12)),
        "share": (aten.addmm.default, (r(6), x(), r(24, 6))),
        "norm": (aten.batch_norm.default, (x(), None, None, None, None, True, 0.1, 1e-5, False)),
        "reduction": (aten.var.dim, (x(), [1])),
        "extreme": (aten.amax.default, (x(), [1])),
        "position": (aten.max.dim, (x(), 1)),
        "cumsum": (aten.cumsum.default, (x(), 1)),
        "experts": (
            aten._grouped_mm.default,
            (r(24, 16).float(), r(4, 16, 32).float(), torch.tensor([5, 5, 11, 24], dtype=torch.int32)),
        ),
        "picked": (aten.index.Tensor, (r(24, 6), [ints(24, 12)])),
        "ring": (aten.scaled_dot_product_attention.default, tuple(r(1, 2, 12, 4) for _ in range(3))),
        "added": (aten.index_add.default, (r(24, 6), 0, ints(24, 12), r(12, 6))),
        "attention": (aten.scaled_dot_product_attention.default, (*(r(2, 6, 4, 4) for _ in range(3)), None, 0.5)),
    }[lowering]
    check_rule(operator, [args], meshes=[(2,)])
    monkeypatch.setitem(localize.LOWERINGS, lowering, lambda new, node, *rest: node)
    with pytest.raises(RuleError, match="is wrong"):
        check_rule(operator, [args], meshes=[(2,)])


def test_a_lowering_with_a_wrong_gradient_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-sum that every rank uses for its own classes, and whose gradients nobody sums."""
    vary = collectives.vary

    def without_vary(self: Any, function: Any, x: Any, axis: int) -> Any:
        return x if function is vary else collective(self, function, x, axis)

    collective = Writer.collective
    monkeypatch.setattr(Writer, "collective", without_vary)
    with pytest.raises(RuleError, match="gradient of operand 0 differs"):
        check_rule(aten.log_softmax.int, [(x(), 1)])


def test_the_error_names_the_call_and_the_placements() -> None:
    with pytest.raises(RuleError) as caught:
        check_rule(aten.cumsum.default, [(r(12, 4), 0)], "c d -> c d")
    text = str(caught.value)
    assert "split over 'c', 2 ranks" in text
    assert "aten.cumsum.default(float64[12, 4], 0)" in text
    assert "operand 0 [12, 4]: Shard(0)" in text


def test_an_operator_without_a_rule_is_an_error() -> None:
    with pytest.raises(RuleError, match="there is no rule"):
        check_rule(aten.linalg_ldl_factor.default, [(r(4, 4),)])


def test_a_rule_that_no_sample_can_try_is_reported() -> None:
    assert check_rule(aten.relu.default, [(r(5, 12),)], meshes=[]).untried == {"d0", "d1"}


def test_losses_look_at_blocks() -> None:
    """The lowerings of a split vocabulary know one range of classes a rank: in blocks it is not split."""
    call = Call("aten.embedding", ((24, 6), (12,)), ((12, 6),), {}, ((24, 6), (12,)))
    rule = find_rule(aten.embedding.default)
    assert rule is not None
    cuts = {f.name: f.cut_for(f.inputs[0], At(0, (1, 1)), 2) for f in rule.function(call).factors}
    assert cuts == {"v": None, "d0": None, "e": None}


def test_a_temporary_rule_goes() -> None:
    before = find_rule(aten.relu.default)
    with temporary_rule(aten.relu.default, "a b! -> a b"):
        assert find_rule(aten.relu.default) is not before
    assert find_rule(aten.relu.default) is before
