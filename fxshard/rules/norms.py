"""Rules of norms. A dim that they normalise is split through a lowering, in which the ranks share their statistics."""

from __future__ import annotations

from fxshard.rules.names import ONE, Names, left, lowered, resized, right, whole
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import Call, Factor, Recipe


def _shared(factors: tuple[Factor, ...], names: Names) -> tuple[Factor, ...]:
    """The factors; over those of ``names`` the ranks share statistics."""
    return lowered(factors, "norm", {n[0] for n in names}, reduced=True)


def trailing_norm(call: Call) -> Recipe:
    """layer_norm, rms_norm: over split normalised dims, the ranks share statistics; weights are split along."""
    ndim = len(call.inputs[0])
    count = len(call.arguments["normalized_shape"])
    names = right(ndim)
    normalized = names[ndim - count :]
    ins = [names] + [names[ndim - len(s) :] for s in call.inputs[1:]]
    statistics: Names = [*names[: ndim - count], *[ONE] * count]
    outs = [names, *[statistics] * (len(call.outputs) - 1)]
    factors = make_factors(ins, outs, call, {n[0]: "~" for n in normalized})
    return Recipe(_shared(factors, normalized))


def group_norm(call: Call) -> Recipe:
    """group_norm: the batch, and the groups of channels (``num_groups`` becomes this rank's).

    Over channels of one group, and over split dims behind the channels, the ranks share statistics.
    """
    ndim = len(call.inputs[0])
    groups = call.arguments["num_groups"]
    now = call.inputs[0][1] if ndim > 1 else None
    if not isinstance(groups, int) or not isinstance(now, int):
        return Recipe()
    behind: Names = [(f"s{d}",) for d in range(2, ndim)]
    weights: list[Names] = [[("c",)]] * (len(call.inputs) - 1)
    ins: list[Names] = [[("b",), ("c",), *behind], *weights]
    factors = _shared(make_factors(ins, [ins[0]], call, {}), [("c",), *behind])
    before = call.whole_inputs[0][1] if call.is_cut else now  # an outer axis may have split some of the groups
    if not isinstance(before, int) or not before or groups * now % before:
        return Recipe(factors)
    weights = [[("g", "c")]] * (len(call.inputs) - 1)
    ins = [[ONE, ("g", "c"), *[ONE] * (ndim - 2)], *weights]
    whole_groups = resized(make_factors(ins, [ins[0]], call, {}), "g", groups * now // before, "groups")
    return Recipe((*whole_groups, *factors))


def batch_norm(call: Call) -> Recipe:
    """batch_norm: in eval mode pointwise; in training the ranks share the statistics of every channel."""
    ndim = len(call.inputs[0])
    if ndim < 2:
        return Recipe()
    names = left(ndim)
    factors = make_factors([names] + [[names[1]]] * (len(call.inputs) - 1), [names], call, {})
    training = call.arguments.get("training")
    return Recipe(_shared(factors, [names[0], *names[2:]]) if training else factors)


def instance_norm(call: Call) -> Recipe:
    """instance_norm: channels, and the batch; over split dims behind them, the ranks share statistics."""
    ndim = len(call.inputs[0])
    if ndim < 3 or call.operand("running_mean") is not None:
        return Recipe()
    names = left(ndim)
    ins = [names] + [[names[1]]] * (len(call.inputs) - 1)
    return Recipe(_shared(make_factors(ins, [names], call, {}), names[2:]))


def weight_norm(call: Call) -> Recipe:
    """_weight_norm(v, g, dim): each index of ``dim`` has a norm over all other dims."""
    ndim = len(call.inputs[0])
    if call.arguments["dim"] == -1 or len(call.inputs[1]) != ndim:
        return Recipe()  # -1 means one norm over all
    names = left(ndim)
    others = [d for d in range(ndim) if d != call.dim("dim", ndim)]
    return Recipe(make_factors([names, names], [names], call, whole(names, others)))
