"""New values for the parts of some weights, beside the present ones: all take their places, or none does.

What is loaded is read into memory of its own first. Only when every rank has all of it are the values put in place,
which cannot fail any more. A part that is on the meta device has nothing to lose: its new memory becomes its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from fxshard.ranks.devices import target_device
from fxshard.weights.materialize import check_values, materialize, swap
from fxshard.weights.weights import Weights


class Staging:
    """Values that are being loaded.

    Args:
        weights: those of a program or a module.
        given: the names that values are loaded for.

    Raises:
        CheckpointError: where a part on the meta device would be left without a value.
    """

    def __init__(self, weights: Weights, given: Collection[str]) -> None:
        self.weights = weights
        self.made = check_values(weights, given)
        self.device = target_device(weights.tensors.values())
        self.values: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, name: str, rank: int | None = None) -> torch.Tensor:
        """Memory for the new value of a part."""
        rank = self.weights.rank if rank is None else rank
        key = self.weights.first_names[name], rank
        if key not in self.values:
            part = self.weights.part(*key)
            device = self.device if part.is_meta else part.device
            self.values[key] = torch.empty(part.shape, dtype=part.dtype, device=device)
        return self.values[key]

    def put(self, name: str, rank: int, value: Any) -> None:
        """Takes a value that has the shape of the part, and lies in memory of its own."""
        self.values[self.weights.first_names[name], rank] = value

    def install(self) -> None:
        """Puts all values in their places."""
        with torch.no_grad():
            for (name, rank), value in self.values.items():
                part = self.weights.part(name, rank)
                if part.is_meta:
                    swap(part, value)
                else:
                    part.copy_(value)
        materialize(self.weights, self.made)
