"""The notation of rules: what it says, and what it refuses."""

from __future__ import annotations

import re

import pytest
import sympy

from fxshard.errors import RuleError
from fxshard.rules.notation import apply, fits, parse
from fxshard.rules.recipe import At, Call, Factor, Shape, combine, uncombine, units
from fxshard.rules.table import all_rules


def factors(text: str, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...]) -> dict[str, Factor]:
    call = Call("test.op", inputs, outputs, {}, inputs)
    return {f.name: f for f in apply(parse(text), call).factors}


def test_linear() -> None:
    found = factors("... i+, o i+ -> ... o", ((4, 12, 8), (6, 8)), ((4, 12, 6),))
    assert found["o"] == Factor("o", 6, (None, At(0)), (At(2),))
    assert found["i"] == Factor("i", 8, (At(2), At(1)), (None,))
    assert found[".0"] == Factor(".0", 12, (At(1), None), (At(1),))
    assert found[".1"] == Factor(".1", 4, (At(0), None), (At(0),))


def test_marks() -> None:
    found = factors("a! b c+ d~ -> a b d", ((2, 3, 4, 5),), ((2, 3, 5),))
    assert set(found) == {"b", "c", "d"}
    assert found["d"].lowering == "d"
    assert found["b"].lowering is None


def test_a_factor_that_is_missing_from_a_result_is_whole() -> None:
    assert set(factors("a b -> a", ((2, 3),), ((2,),))) == {"a"}
    assert set(factors("a b -> a b, a", ((2, 3),), ((2, 3), (2,)))) == {"a"}


def test_a_new_dim_is_whole() -> None:
    assert set(factors("a -> a new", ((2,),), ((2, 7),))) == {"a"}


def test_broadcast() -> None:
    """A dim of size 1 lacks the factor that is larger elsewhere, and dots align from the right."""
    assert factors("a b, a b -> a b", ((4, 6), (1, 6)), ((4, 6),))["a"].inputs == (At(0), None)
    found = factors("..., ... -> ...", ((4, 6), (6,)), ((4, 6),))
    assert found[".0"].inputs == (At(1), At(0))
    assert found[".1"].inputs == (At(0), None)


def test_compound() -> None:
    """Of ``(h d)`` only the major factor is split, as the dim's own."""
    found = factors("b (h d) -> b h d", ((2, 24),), ((2, 4, 6),))
    assert found["h"] == Factor("h", 4, (At(1),), (At(1),))
    assert "d" not in found


def test_a_factor_of_two_sizes_is_whole() -> None:
    assert set(factors("a b, a b -> a b", ((4, 6), (4, 3)), ((4, 6),))) == {"a"}


def test_symbolic_sizes() -> None:
    batch = sympy.Symbol("s0", positive=True, integer=True)
    assert factors("b i+, o i+ -> b o", ((batch, 8), (6, 8)), ((batch, 6),))["b"].size == batch


def test_scalars_and_one() -> None:
    assert set(factors("k+, k+ ->", ((4,), (4,)), ((),))) == {"k"}
    assert set(factors("a 1 -> a", ((4, 1),), ((4,),))) == {"a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "exactly one '->'"),
        ("a -> b -> c", "exactly one '->'"),
        ("a+ -> a", "factor 'a' sums, yet it is in a result"),
        ("a+ a! -> b", "two marks"),
        ("... a ... -> a", "one '...'"),
        ("a? -> a", "cannot read"),
        ("(a (b c)) -> a", "cannot read"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)):
        parse(text)


def test_shapes_that_do_not_fit() -> None:
    call = Call("test.op", ((2, 3),), ((2,),), {})
    assert not fits(parse("a, b -> a"), call)
    assert not fits(parse("a -> a"), call)
    assert not fits(parse("... a b c -> a"), call)
    assert fits(parse("... b+ -> ..."), call)
    with pytest.raises(RuleError, match="2 operands and 1 results, the call of test"):
        apply(parse("a, b -> a"), call)
    with pytest.raises(RuleError, match="got a tensor of 2 dims"):
        apply(parse("a -> a"), call)


def test_every_row_of_the_table_is_well_formed() -> None:
    for rule in all_rules().values():
        if not rule.text.startswith("@"):
            parse(rule.text)


def test_blocks() -> None:
    assert uncombine(combine((1, 1, 1), (2, 1)), (1, 1, 1)) == (2, 1)
    assert units(12, (2, 1), 2)
    assert not units(12, (2, 1), 3)
    assert not units(5, (1, 1), 2)
