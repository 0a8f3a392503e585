"""docs/ops.md, written from the table: ``python -m fxshard.rules.docs`` prints it."""

from __future__ import annotations

import sys

from fxshard.rules.table import Rule, all_rules, rule_function

UNSPLIT = {
    "arange empty eye full ones rand randn zeros": "has no tensor operand: every rank makes the whole, and cuts "
    "it where it meets a split tensor",
    "bernoulli exponential normal rand_like randn_like randint_like uniform": "draws random numbers: a part of the "
    "draw is not a draw of the part",
    "dropout (in training), scaled_dot_product_attention (with dropout)": "draws too, but has a lowering: each "
    "rank draws the whole mask, as one device does, and keeps its part",
    "item, bincount, histc, nonzero, unique, masked_select": "what it gives, or its shape, depends on all values",
    "masked_scatter": "where a value goes depends on the whole mask",
    "as_strided, view.dtype": "speaks of memory, not of dims",
    "expand_as, reshape_as, type_as, view_as": "`normalize` rewrites it with sizes or a dtype: of its second operand "
    "no value is read",
    "sym_size and other readers of shapes": "gives the size of the whole tensor, from what a rank knows, without "
    "communication",
    "_assert_tensor_metadata and other guards": "`normalize` drops it",
    "in-place operators": "`normalize` rewrites them functionally",
}
"""Operators that are met in models and have no rule, or one that never splits, and why."""

HEAD = """\
# Operators

<!-- Written by `python -m fxshard.rules.docs > docs/ops.md`; do not edit. -->

What the rules of fxshard say of {count} ATen operators. A rule names the *factors* of an operator, those dims that a
mesh axis may split:

| notation | the factor |
|---|---|
| `d` | may be split: operands that have it are split there, those that lack it are whole; so are the results |
| `d+` | sums: it is missing from the results, which become `Partial(sum)` |
| `d!` | stays whole; so does one that only a result has |
| `d~` | is split through a lowering, a local replacement of the call |
| `...` | any number of dims, aligned from the right as in broadcasting |
| `(h d)` | one dim of two factors, `h` the major one, which alone may be split |

Where no notation says it, the rule is a function of the call's shapes and arguments, described in words. *Linear*: the
operands through which a `Partial` may pass, unreduced: `0` the first one alone, `0;1` either, `0,1` both at once, `all`
every one at once. Functions may name sets of their own.

Every row is proven by running it: see `fxshard.check_rule` and tests/rules. An operator that is not here is right all
the same: its operands are gathered, and the report says so. `fxshard.register_rule` teaches a new one.

| operators | rule | linear |
|---|---|---|
"""


def ops_page() -> str:
    """The text of docs/ops.md.

    >>> print(ops_page().splitlines()[0])
    # Operators
    """
    rules = all_rules()
    own = {name: rule for name, rule in rules.items() if name.startswith("aten.")}
    rows: dict[tuple[str, str], list[str]] = {}
    for name, rule in own.items():
        rows.setdefault((_describe(rule), rule.linear), []).append(name.removeprefix("aten."))
    lines = [f"| {' '.join(sorted(names))} | {text} | {linear} |" for (text, linear), names in rows.items()]
    tail = ["", "## What is never split, and why", "", "| operators | |", "|---|---|"]
    tail += [f"| {names} | {why} |" for names, why in UNSPLIT.items()]
    return HEAD.format(count=len(own)) + "\n".join([*lines, *tail]) + "\n"


def _describe(rule: Rule) -> str:
    if not rule.text.startswith("@"):
        return f"`{rule.text}`"
    text = (rule_function(rule.text).__doc__ or "").split("\n\n")
    words = " ".join(" ".join(text).split())
    return words.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(ops_page())
