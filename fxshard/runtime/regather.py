"""Gathered weights are not kept for the backward pass: it gathers them again, from the parts.

What autograd saves of a gathered weight, or of a view of it, is replaced by how to gather it (``saved_tensors_hooks``).

Reference: ZeRO (Rajbhandari et al., 2020), stage 3; FSDP's ``reshard_after_forward``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxshard.errors import FxshardError
from fxshard.torch_internals import saving_hooks


@dataclass
class _Gathered:
    """One gathered weight: itself while it lives, the part that this rank holds, and how to gather it again.

    It is always gathered again, even if it lives on: how long Python lets it live is not the same on all ranks.
    """

    whole: weakref.ref[torch.Tensor]
    part: torch.Tensor
    version: int
    again: Callable[[], torch.Tensor]
    together: Together | None = None

    def get(self) -> torch.Tensor:
        """The whole weight."""
        if self.part._version != self.version:
            raise FxshardError(
                "a weight was changed in place between the forward and the backward pass, which gathers it again",
                fix="call backward() before the optimizer's step, or give regather=False to parallelize",
            )
        return self.again()


@dataclass
class _View:
    """What autograd saved: a view of a gathered weight."""

    of: _Gathered
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Together:
    """What one call gathered at once.

    Attributes:
        gather: gathers all of it again.
        begin: begins to do so.
        lane: what takes turns; None where there is nothing to keep for others.
        saved: of that call, all of the like, as they were gathered, and whether autograd saved any of it: the backward
            pass asks in the opposite order.
    """

    gather: Callable[[], Sequence[torch.Tensor]]
    begin: Callable[[], None]
    lane: int | None
    saved: dict[Together, bool]


class Gathering(Protocol):
    """Gathers weights which are not to be kept for the backward pass."""

    def gather(self, gather: Callable[[], torch.Tensor], part: torch.Tensor) -> torch.Tensor:
        """What ``gather()`` returns, the whole weight of which this rank holds ``part``."""


class Regather:
    """The gathered weights of one program that are alive, by their memory."""

    def __init__(self) -> None:
        self.alive: dict[int, _Gathered] = {}
        self.is_saving = False
        self.saved: dict[Together, bool] = {}
        self.last: dict[int, tuple[Together, Sequence[torch.Tensor]]] = {}

    def gather(self, gather: Callable[[], torch.Tensor], part: torch.Tensor) -> torch.Tensor:
        """The whole weight of which this rank holds ``part``; until ``saving`` ends it is known how it came about."""
        whole = gather()
        self.note(whole, part, torch.no_grad()(gather))
        return whole

    def note(
        self,
        whole: torch.Tensor,
        part: torch.Tensor,
        again: Callable[[], torch.Tensor],
        together: Together | None = None,
    ) -> None:
        """``again()`` gives ``whole`` once more; kept in mind until ``saving`` ends."""
        place = whole.untyped_storage().data_ptr()
        if place and self.is_saving:
            self.alive[place] = _Gathered(weakref.ref(whole), part.detach(), part._version, again, together)
            if together is not None:
                self.saved.setdefault(together, False)

    def from_last(self, together: Together, index: int) -> torch.Tensor:
        """One of several weights that are gathered together: they are kept until others of the lane are asked for."""
        last, wholes = self.last.get(together.lane, (None, ())) if together.lane is not None else (None, ())
        if last is not together:
            together.begin()
            _begin_before(together)
            wholes = together.gather()
            if together.lane is not None:
                self.last[together.lane] = together, wholes
        return wholes[index]

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within it, what autograd saves of gathered weights is how to gather them; the rest goes the usual way."""
        pack, unpack = saving_hooks() or (_itself, _itself)

        def save(x: torch.Tensor) -> Any:
            found = self.alive.get(x.untyped_storage().data_ptr())
            whole = found.whole() if found is not None else None
            if found is None or whole is None or whole.dtype != x.dtype:
                return pack(x)
            if found.together is not None:
                self.saved[found.together] = True
            return _View(found, x.shape, x.stride(), int(x.storage_offset()))

        def restore(saved: Any) -> torch.Tensor:
            if not isinstance(saved, _View):
                usual: torch.Tensor = unpack(saved)
                return usual
            return saved.of.get().as_strided(saved.size, saved.stride, saved.offset)

        with torch.autograd.graph.saved_tensors_hooks(save, restore):
            self.is_saving = True
            self.saved = {}
            self.last.clear()
            try:
                yield
            finally:
                self.is_saving = False
                self.alive.clear()


def _begin_before(together: Together) -> None:
    """Begins to gather what the backward pass asks for next."""
    saved = together.saved
    if together in saved:
        while saved.popitem()[0] is not together:
            pass
        while saved and not next(reversed(saved.values())):
            saved.popitem()
        if saved:
            next(reversed(saved)).begin()


def _itself(x: Any) -> Any:
    return x
