"""The model that a program was made of, which it does not keep alive once its parts are placed.

A rank needs its parts only. What later captures and the names need of the model is its structure: a copy whose
parameters have shapes, dtypes and devices, but no memory. While the user keeps the model, it is what is captured, so
that a changed configuration counts.
"""

from __future__ import annotations

import copy
import gc
import logging
import types
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from fxshard.runtime.module import joined

logger = logging.getLogger("fxshard")

_OF_MODULES = frozenset(vars(nn.Module()))
MOST = 5000
"""Of how many objects it is told whether they lead to modules."""


class Original:
    """The model: itself, until ``release`` makes it the user's to keep.

    >>> model = nn.Linear(2, 3)
    >>> original = Original(model)
    >>> original.release()
    True
    >>> original.get() is model, original.has_values
    (True, True)
    >>> del model
    >>> original.get().weight.shape, original.has_values
    (torch.Size([3, 2]), False)
    """

    def __init__(self, model: nn.Module) -> None:
        self._strong: nn.Module | None = model
        self._weak = weakref.ref(model)
        self._hollow: nn.Module | None = None

    def get(self) -> nn.Module:
        """The model; where it is gone, its structure."""
        model = self._strong or self._weak() or self._hollow
        assert model is not None
        return model

    @property
    def has_values(self) -> bool:
        """Whether its parameters have values."""
        return (self._strong or self._weak()) is not None

    def release(self) -> bool:
        """Lets the model go when the user does; False where it cannot be copied, and is kept."""
        model = self._strong
        if model is None:
            return True
        try:
            self._hollow = hollow(model)
        except Exception as error:
            logger.warning(
                f"the whole model is kept in memory on this rank, since its structure cannot be copied: {error}"
            )
            return False
        self._strong = None
        return True

    def empty(self, modules: Iterable[nn.Module]) -> None:
        """Replaces the parameters that other modules hold under the model's names by ones without memory."""
        if self._hollow is None:
            return
        known = dict(self._hollow.named_parameters(remove_duplicate=False))
        for module in modules:
            for path, child in module.named_modules(remove_duplicate=False):
                for name in [n for n, p in child._parameters.items() if p is not None]:
                    same = known.get(joined(path, name))
                    if same is not None:
                        child._parameters[name] = same


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have no memory; buffers are copied."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        if not parameter.is_meta:
            memo[id(parameter)] = _without_memory(parameter)
    for module in model.modules():  # a configuration stays the user's: what changes in it counts
        for name, value in vars(module).items():
            if name not in _OF_MODULES and not _holds_modules(value):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _holds_modules(value: object) -> bool:
    """Whether a value is, or leads to, modules or tensors, as far as can be seen."""
    pending, met = [value], dict[int, object]()
    while pending:
        item = pending.pop()
        if isinstance(item, nn.Module | torch.Tensor) or len(met) > MOST:
            return True
        if id(item) not in met and not isinstance(item, type | types.ModuleType | types.FunctionType):
            met[id(item)] = item
            pending += gc.get_referents(item)
    return False


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    with torch.no_grad():
        made = torch.empty_like(parameter)
        made.untyped_storage().resize_(0)
    out = nn.Parameter(made, parameter.requires_grad)
    out.__dict__.update(parameter.__dict__)
    return out
