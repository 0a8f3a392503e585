"""docs/ops.md, written from the table: ``python -m fxshard.rules.docs`` prints it."""

from __future__ import annotations

import sys

from fxshard.rules.table import Rule, rule_function, table_rules

NO_RULE = {
    "arange empty eye full linspace ones rand randn tril_indices triu_indices zeros": "has no tensor operand: every "
    "rank makes the whole, and cuts it where it meets a split tensor",
    "dropout (in training), scaled_dot_product_attention (with dropout)": "draws too, but has a lowering: each "
    "rank draws the whole mask, as one device does, and keeps its part",
    "expand_as, reshape_as, type_as, view_as": "`normalize` rewrites it with sizes or a dtype: of its second operand "
    "no value is read",
    "sym_size and other readers of shapes": "gives the size of the whole tensor, from what a rank knows, without "
    "communication",
    "_assert_tensor_metadata and other guards": "`normalize` drops it",
    "in-place operators": "`normalize` rewrites them functionally",
}
"""What is met in models and needs no rule, and why."""

HEAD = """\
# Operators

<!-- Written by `python -m fxshard.rules.docs > docs/ops.md`; do not edit. -->

What the rules of fxshard say of {count} operators, those of ATen without their namespace. A rule names the *factors*
of an operator, those dims that a mesh axis may split:

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
    rows: dict[tuple[str, str], list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for name, rule in table_rules().items():
        short = name.removeprefix("aten.")
        if rule.whole:
            reasons.setdefault(rule.whole, []).append(short)
        else:
            rows.setdefault((_describe(rule), rule.linear), []).append(short)
    lines = [f"| {' '.join(sorted(names))} | {text} | {linear} |" for (text, linear), names in rows.items()]
    tail = ["", "## Whole on purpose", "", "Their operands are gathered, and every rank computes the whole.", ""]
    tail += ["| operators | because |", "|---|---|"]
    tail += [f"| {' '.join(sorted(names))} | {why} |" for why, names in reasons.items()]
    tail += ["", "## Without a rule, and not gathered", "", "| operators | because |", "|---|---|"]
    tail += [f"| {names} | {why} |" for names, why in NO_RULE.items()]
    return HEAD.format(count=sum(map(len, rows.values()))) + "\n".join([*lines, *tail]) + "\n"


def _describe(rule: Rule) -> str:
    if not rule.text.startswith("@"):
        return f"`{rule.text}`"
    text = (rule_function(rule.text).__doc__ or "").split("\n\n")
    words = " ".join(" ".join(text).split())
    return words.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(ops_page())
