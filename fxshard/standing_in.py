"""A program as people treat it, who take it for its model: what can be honoured is, and all else is refused.

program.config, program.dtype                   the model's own attributes and methods, over this rank's weights
program.alpha = 2.0, program.eval()             another capture
program.weight = nn.Parameter(...)              refused, as ``weights.mirror`` does for its parts
program.half(), pickle.dumps(program)           refused
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn, Self

import torch
from torch import nn

from fxshard.capture.capture import LOCK
from fxshard.captures import Captures
from fxshard.errors import FxshardError
from fxshard.weights.mirror import (
    WHOLE_WRAP,
    check_unmoved,
    refuse,
    refuse_replacing,
    share_memory,
    wrapper_at_work,
)
from fxshard.weights.original_model import Original

HIDDEN = {
    "axes", "capture", "capture_at", "check_alike", "compare_ranks", "compile_call", "compiled", "computes_on",
    "finish", "function", "joint", "modules_here", "note_loaded", "place_constants", "ranks_made", "run", "source",
    "weights_here",
    "T_destination", "add_module", "bfloat16", "call_super_init", "double", "dump_patches", "extra_repr", "float",
    "get_extra_state", "half", "ipu", "mtia", "set_extra_state", "set_submodule", "to_empty", "type", "xpu",
}  # fmt: skip
"""What stands on a program for its own parts, and what modules have and a program refuses."""


class StandIn(nn.Module):
    """What a program has of ``nn.Module``."""

    _original: Original
    _captures: Captures

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_shown"] = None  # the model's modules over this rank's weights, once it was captured

    def modules_here(self) -> list[Any]:
        """The modules of the ranks that are this process's."""
        raise NotImplementedError

    def rank_module(self, rank: int) -> Any:
        """A rank's module."""
        raise NotImplementedError

    @property
    def ranks_made(self) -> Collection[int]:
        """The ranks that have one."""
        raise NotImplementedError

    def _take_signature(self, model: nn.Module) -> None:
        """Gives ``forward`` the signature of the model's, which trainers look at."""
        cls = type(self)
        signature = inspect.signature(model.forward)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        plain = cls.forward
        forward = types.FunctionType(plain.__code__, plain.__globals__, "forward")
        forward.__doc__, forward.__qualname__, forward.__module__ = plain.__doc__, plain.__qualname__, plain.__module__
        parameters = [each for each in signature.parameters.values() if each.name != "self"]
        forward.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]
        made = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
        object.__setattr__(self, "__class__", made)

    def __getattr__(self, name: str) -> Any:
        """What the model has, and a program has not: ``config``, ``dtype``, ``get_input_embeddings``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_original" not in self.__dict__:
                raise
        if name.startswith("_ddp_"):
            refuse("the program is no replica", WHOLE_WRAP)
        shown = self.__dict__["_shown"]
        if shown is not None:
            return getattr(shown, name)
        value = getattr(self._original.get(), name)
        if isinstance(value, torch.Tensor | nn.Module | types.MethodType):
            raise FxshardError(
                f"the program has no {name!r} before the model was captured",
                fix="pass example inputs to parallelize, or call the program once",
            )
        return value

    def __dir__(self) -> list[str]:
        """What users call: of the program, and of its model; not what its own parts call, nor what is refused."""
        model = self.__dict__["_shown"] or self._original.get()
        names = {*object.__dir__(self)} - HIDDEN | {*dir(model)} - {*dir(nn.Module)}
        return sorted(name for name in names if name.isidentifier() and not name.startswith(("_", "register_")))

    def __setattr__(self, name: str, value: Any) -> None:
        """Modes and the model's plain attributes mean another capture; weights and modules cannot be replaced."""
        refuse_replacing("", name, value)
        if name == "__class__":
            refuse("the program cannot become another class", "wrap the model before parallelize")
        shown = self.__dict__.get("_shown")
        if shown is not None:
            if name == "training":
                self._captures.changes.set_mode("", value)
            elif name not in self.__dict__ and not hasattr(type(self), name):
                setattr(shown, name, value)
                if not name.startswith("_"):
                    return
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """What the program's code reads stays."""
        if name not in self.__dict__:
            refuse(f"{name} cannot be deleted: the program's code reads it", "change the model, and parallelize again")
        super().__delattr__(name)

    def _refuse_adding(self, name: str, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"nothing can be added to a program ({name!r})", "change the model, and parallelize again")

    register_parameter = register_buffer = add_module = register_module = _refuse_adding

    def train(self, mode: bool = True) -> Self:
        """As the model's own ``train``; another mode is another capture."""
        return self._set_modes(lambda model: model.train(mode))

    def eval(self) -> Self:
        """As the model's own ``eval``."""
        return self._set_modes(lambda model: model.eval())

    def _set_modes(self, function: Callable[[nn.Module], object]) -> Self:
        """Lets the model's code say which of its modules have which mode, and gives the program these."""
        changes, shown = self._captures.changes, self._shown
        if shown is not None:
            function(shown)
            self.__dict__["training"] = shown.training
            changes.set_mode("", shown.training)
            return self
        with LOCK, changes.on(self._original.get()):  # the model's modes are the user's
            function(self._original.get())
            modes = {path: module.training for path, module in self._original.get().named_modules()}
        for path, mode in modes.items():
            changes.set_mode(path, mode)
        self.__dict__["training"] = modes[""]
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As ``nn.Module.named_modules``; wrappers of what holds a program meet it here."""
        if wrapper_at_work():
            refuse("the program is no replica", WHOLE_WRAP)
        found: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return found

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As ``nn.Module.requires_grad_``, for all ranks that this process holds."""
        if self._shown is None:
            refuse(
                "the program has no weights before the model was captured",
                "say so of the model, pass example inputs to parallelize, or call the program once",
            )
        for module in self.modules_here():
            module.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module.zero_grad``, for all ranks that this process holds."""
        for rank in self.ranks_made:
            self.rank_module(rank).zero_grad(set_to_none)

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``to``, ``half``, ``cuda``: nothing that would change a tensor's dtype or device."""
        check_unmoved(self._original.get() if self._shown is None else self, function)
        return self

    def share_memory(self) -> Self:
        """As ``nn.Module.share_memory``, for all ranks that this process holds."""
        for module in self.modules_here() if self._shown is not None else ():
            share_memory(module)
        return self

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse("the program is no replica", WHOLE_WRAP)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A program cannot be pickled: it runs in a process group, over code that was made for one rank of it."""
        raise FxshardError(
            "a program cannot be pickled, nor saved with torch.save",
            fix="save fxshard.save_checkpoint(program, ...) or program.full_state_dict(), and parallelize the model in "
            "the process that loads it",
        )
