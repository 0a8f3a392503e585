"""Calls that are computed anew in the backward pass: how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from fxshard.codegen.regions import Region
from fxshard.rules.lookup import draws
from fxshard.torch_internals import HigherOrderOperator


def call_of(region: Region, function: str, arguments: Iterable[str], is_uneven: bool) -> str:
    """The text of a call, ``mlp(x)`` or ``checkpoint(mlp, x)``.

    Args:
        region: the call.
        function: what is called.
        arguments: with what.
        is_uneven: whether the ranks' programs differ.
    """
    if not region.checkpoint:
        return f"{function}({', '.join(arguments)})"
    options = ["draws=True"] if any(map(_draws, nodes_of(region))) else []
    options += ["together=True"] if is_uneven else []
    return f"checkpoint({', '.join([function, *arguments, *options])})"


def nodes_of(region: Region) -> Iterator[fx.Node]:
    """The nodes of a call and of those inside it, in order."""
    for item in region.items:
        if isinstance(item, Region):
            yield from nodes_of(item)
        else:
            yield item


def _draws(node: fx.Node) -> bool:
    return draws(node) or isinstance(node.target, HigherOrderOperator)  # what it calls may draw
