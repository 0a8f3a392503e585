"""The value of the way that was taken, of two.

A model may skip a layer by chance (layer drop), or take another way for some inputs. In the graph both ways stand, one
behind the other, and :data:`TAKEN` picks what the one gives that is taken; only that one is run. All ranks take the
same: what decides is a number that each of them holds whole.

    d = rand([]) < 0.1                d = rand([]) < 0.1
    if d:                             z = layer(x)                # not run where d is true
        y = x                ->       y = taken(d, x, z, 0)
    else:
        y = layer(x)
"""

from __future__ import annotations

import torch

_library = torch.library.Library("fxshard", "FRAGMENT")
_library.define("taken(Tensor decision, Tensor yes, Tensor no, int number) -> Tensor")


def _taken(decision: torch.Tensor, yes: torch.Tensor, no: torch.Tensor, number: int) -> torch.Tensor:
    """``yes`` or ``no``, where both are there: of the shape that both have."""
    return torch.where(decision, yes, no)


_library.impl("taken", _taken, "CompositeImplicitAutograd")
TAKEN = torch.ops.fxshard.taken.default
"""``taken(decision, yes, no, number)``: the value of the way that ``decision``, a bool, takes at branch ``number``."""
