"""Random numbers that a model draws outside of torch: of Python's ``random``, and of numpy.

A graph cannot draw them: they would be what they were at capture, for ever. That does no harm where they decide nothing
(a layer is dropped where a draw is below 0), which two more traces show: one in which all such numbers are as small as
they can be, one in which they are as large.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

__all__ = ["host_state", "is_same_state", "put_back_host_state", "replaced_draws", "seed_host"]

_NUMBERS = {
    "random": ("random", "uniform"),
    "numpy.random": ("random", "random_sample", "rand", "uniform"),
}
"""What gives one number between two others, if it is asked for no more."""
EDGE = 1e-9


def _numpy() -> ModuleType | None:
    return sys.modules.get("numpy.random")  # not ours: a model may draw from it


def host_state() -> dict[str, Any]:
    """Where the sources of random numbers stand: the name of a module -> its state."""
    numpy = _numpy()
    return {"random": random.getstate()} | ({"numpy.random": numpy.get_state()} if numpy else {})


def put_back_host_state(state: Mapping[str, Any]) -> None:
    """Puts them back to where they stood."""
    random.setstate(state["random"])
    if "numpy.random" in state:
        sys.modules["numpy.random"].set_state(state["numpy.random"])


def seed_host(seed: int) -> None:
    """Lets them begin anew."""
    random.seed(seed)
    numpy = _numpy()
    if numpy:
        numpy.seed(seed)


def is_same_state(a: Any, b: Any) -> bool:
    """Whether two states of one source are equal."""
    return all(map(_is_equal, a, b))


def _is_equal(a: Any, b: Any) -> bool:
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


@contextlib.contextmanager
def replaced_draws(high: bool) -> Iterator[None]:
    """Gives other numbers than outside: single ones near the upper or the lower end, arrays of another seed."""
    state = host_state()
    modules = {name: sys.modules[name] for name in state}
    own = {(name, each): getattr(modules[name], each) for name in modules for each in _NUMBERS[name]}

    def replacing(draw: Any, bounded: bool) -> Any:
        def drawn(*args: Any, **kwargs: Any) -> Any:
            value = draw(*args, **kwargs)
            if hasattr(value, "shape") and value.shape:
                return value
            low, top = (*args[:2], *(0.0, 1.0)[len(args) :]) if bounded else (0.0, 1.0)
            return low + (top - low) * (1 - EDGE if high else EDGE)

        return drawn

    seed_host(high + 1)
    try:
        for (name, each), draw in own.items():
            setattr(modules[name], each, replacing(draw, each == "uniform"))
        yield
    finally:
        for (name, each), draw in own.items():
            setattr(modules[name], each, draw)
        put_back_host_state(state)
