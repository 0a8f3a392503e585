"""Where the compiler had to gather because an operator has no rule, or none that splits it, and how to mend that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxshard.inspect.suggest import suggest
from fxshard.ir.info import info_of, num_bytes, values_of
from fxshard.ir.origins import module_of, source_of
from fxshard.passes.pipeline import Compiled
from fxshard.passes.propagate import constrain
from fxshard.placement import is_partial, is_shard
from fxshard.rules.recipe import operands_of
from fxshard.rules.table import find_rule, name_of
from fxshard.runtime.autocast import under_autocast
from fxshard.torch_internals import OperatorBase, OpOverload


@dataclass(frozen=True)
class Fallback:
    """One call that runs whole on every rank because its operator has no rule, or stays whole on purpose.

    Attributes:
        operator: e.g. ``mylib.scale``.
        module: the module that calls it.
        source: the line of the user's source.
        num_bytes: the bytes of the operands that are gathered, or reduced, for it; 0 where tensor parallelism splits
            nothing before it for its sake.
        fix: a line that teaches fxshard the operator, tried on this call; or one to complete, where none was found.
        why: why the operator stays whole on purpose; empty where it has no rule.
    """

    operator: str
    module: str
    source: str
    num_bytes: int
    fix: str
    why: str = ""

    def __str__(self) -> str:
        where = ", ".join(x for x in (self.module, self.source) if x) or "the model"
        what = f"stays whole, since {self.why}" if self.why else "has no rule"
        mend = "" if self.why else f"; to split it, {self.fix}"
        if not self.num_bytes:
            ends = f"tensor parallelism ends at it in {where}, and every rank computes it whole"
            return f"{self.operator} {what}: {ends}{mend}"
        return (
            f"{self.operator} {what}: {self.num_bytes:,} bytes are gathered for it in {where}, "
            f"and every rank computes it whole{mend}"
        )


def fallbacks_of(compiled: Compiled) -> list[Fallback]:
    """The fallbacks of a compiled graph, in order."""
    out = []
    for node in compiled.stages["propagate"].nodes:
        operator = str(node.args[1]) if node.target is under_autocast else name_of(node.target)[1]
        is_operator = node.target is under_autocast or isinstance(node.target, OperatorBase)
        rule = find_rule(node.target) if is_operator else None
        if not is_operator or (rule is not None and not rule.whole):
            continue
        gathered = [o for o, wanted in _operands(node) if wanted]
        ends_here = node.name in compiled.resolved.without_rule
        if ends_here and not gathered:
            gathered = [o for o in operands_of(node) if _is_gathered(o)]
        if gathered or ends_here:
            teachable = isinstance(node.target, OpOverload)
            fix = _rule(operator, node) if teachable else "write it with operators that have rules"
            total = sum(num_bytes(values_of(o)[0]) for o in gathered)
            out.append(Fallback(operator, module_of(node), source_of(node), total, fix, rule.whole if rule else ""))
    return out


def _rule(operator: str, node: fx.Node) -> str:
    """A line that registers a rule for the call of ``node``: one that was tried, or one to complete."""
    name = operator.replace(".", "::", 1)
    found = suggest(node)
    if found is not None:
        text, linear = found
        return f'fxshard.register_rule("{name}", "{text}"' + (f', linear="{linear}")' if linear else ")")
    call = ", ".join(_dims(values_of(o)[0].dim()) for o in operands_of(node) if hasattr(values_of(o)[0], "dim"))
    result = ", ".join(_dims(v.dim()) for v in values_of(node) if hasattr(v, "dim"))
    return f'fxshard.register_rule("{name}", "{call} -> {result}") with a factor a dim'


def _operands(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    choices = info_of(node).choices
    out = []
    for i, operand in enumerate(operands_of(node)):
        known = info_of(operand).placements
        asked = [c is not None and c.inputs[i] is not None for c in choices]
        out.append((operand, any(a and (is_shard(p) or is_partial(p)) for a, p in zip(asked, known, strict=True))))
    return out


def _is_gathered(node: fx.Node, depth: int = 3) -> bool:
    """Whether the plan has a value gathered, or what it is computed from alone: a product that no pair splits."""
    if node.target is constrain:
        (source,) = operands_of(node)
        return any(map(is_shard, info_of(source).placements)) and not any(map(is_shard, info_of(node).placements))
    if node.op != "call_function" or not depth:
        return False
    sources = [o for o in operands_of(node) if o.op == "call_function"]
    return len(sources) == 1 and _is_gathered(sources[0], depth - 1)


def _dims(count: int) -> str:
    return " ".join("abcdefghijklmnopqrstuvwxyz"[:count])
