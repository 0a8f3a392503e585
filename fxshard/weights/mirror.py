"""The modules that a program shows: those of the model, with this rank's parts of their weights.

``program.model.layers[0]`` is an instance of the layer's class, so that code which sorts modules by their classes, or
reads their plain attributes, finds what it looks for. A module whose weights every rank holds whole can be called. One
with parts does not run, and what a program could not honour is refused:

    program.lm_head.weight = nn.Parameter(...)      replaced weights, buffers and modules
    program.model.norm.register_forward_hook(...)   hooks on parts
    program.model.layers[0](x)                      calls of modules with parts
    DDP(program), fully_shard(program)              wrappers that take parts for replicas

What means another capture is honoured: ``train()`` and ``eval()`` of a part, and plain attributes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import fx, nn

from fxshard.errors import FxshardError
from fxshard.runtime.module import Container, joined
from fxshard.weights.layout import layout_of

WRAPPERS = {
    "torch.nn.parallel.distributed": "DistributedDataParallel",
    "torch.distributed.fsdp": "FSDP (fully_shard)",
    "torch.distributed._composable": "a wrapper of torch.distributed",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "torch.nn.parallel.replicate": "DataParallel",
    "deepspeed": "DeepSpeed",
}
"""Modules whose functions wrap other modules -> what they are called."""
WHOLE_WRAP = (
    "use the program as it is: it sums the gradients itself. For data parallelism give parallelize the plan "
    "data_parallel(n), or zero(n), alone or joined with others"
)
_OF_MODULES = frozenset(vars(nn.Module()))
_BOUND = "_fxshard"


class Listener(Protocol):
    """What is told of changes to modules of a program."""

    def set_mode(self, module: str, training: bool) -> None:
        """A module got a mode."""

    def set_attribute(self, module: str, name: str, value: Any) -> None:
        """A module got an attribute."""


def wrapper_at_work() -> str:
    """The wrapper of modules among the callers; empty if there is none."""
    frame = sys._getframe(1)
    found = ""
    while frame is not None and not found:
        name = frame.f_globals.get("__name__", "")
        found = next((text for package, text in WRAPPERS.items() if str(name).startswith(package)), "")
        frame = frame.f_back  # type: ignore[assignment]
    return found


def refuse(what: str, fix: str) -> NoReturn:
    """Raises the error for what a program cannot honour; it names the wrapper that did it, if one did."""
    wrapper = wrapper_at_work()
    if wrapper:
        raise FxshardError(f"{wrapper} cannot wrap a program: its weights are parts, and no replicas", fix=WHOLE_WRAP)
    raise FxshardError(what, fix=fix)


def refuse_replacing(where: str, name: str, value: Any, held: bool = False) -> None:
    """Raises where ``value`` would take the place of a weight, a buffer or a module of a program.

    Args:
        where: the name of the module.
        name: what is assigned.
        value: what to.
        held: whether the module has such a thing under the name.
    """
    if held or isinstance(value, nn.Module | torch.Tensor):
        kind = "module" if isinstance(value, nn.Module) else "parameter or buffer"
        refuse(
            f"{where or 'the program'}.{name} cannot be given another {kind}: a program's weights are parts, of which "
            "its code knows",
            "copy values in place (load_state_dict, or copy_ under no_grad), or change the model and parallelize again",
        )


def refuse_patching(where: str, cls: type, name: str, value: Any) -> None:
    """Raises where a function would take the place of a method: the program's code was made of the method."""
    if callable(value) and not isinstance(value, type) and callable(getattr(cls, name, None)):
        refuse(
            f"{where or 'the program'}.{name} cannot be given another function: the program does not call it",
            "patch the model before parallelize",
        )


class Fixed(dict[str, Any]):
    """The modules of a module of a program: there are always these."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(
            f"the modules in {self.path or 'the program'} cannot be added to, replaced or removed: the program's code "
            "was made of these",
            "change the model, and parallelize again",
        )

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse


class Mirror:
    """What the modules of a program have in front of the classes of the model's."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Classes of the model's may count their subclasses: these are none."""

    def _place(self) -> tuple[str, Listener]:
        return self.__dict__[_BOUND]  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        """Modes and plain attributes are told to the program; weights and modules cannot be replaced."""
        path, listener = self._place()
        if name == "training":
            self.__dict__[name] = value
            listener.set_mode(path, value)
        elif name == "__class__":
            refuse(f"{path or 'the program'} cannot become another class", "wrap the model before parallelize")
        else:
            held = name in self.__dict__["_parameters"] or name in self.__dict__["_modules"]
            refuse_replacing(path, name, value, held)
            refuse_patching(path, type(self), name, value)
            self.__dict__[name] = value
            if name not in _OF_MODULES:
                listener.set_attribute(path, name, value)

    def __delattr__(self, name: str) -> None:
        """Nothing can be taken from a program."""
        refuse(f"{self._place()[0]}.{name} cannot be deleted: the program's code reads it", "change the model first")

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own code, unless weights are parts."""
        self._check_whole(
            "and cannot be called",
            "call the program; for a module on its own, parallelize that module, or leave its weights "
            'whole: tensor_parallel(2) | Plan(params={"name": {"tp": Replicate()}})',
        )
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _check_whole(self, what: str, fix: str) -> None:
        """Raises where this rank holds parts of a module's weights."""
        assert isinstance(self, nn.Module)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            layout = layout_of(tensor)
            if layout is not None and layout.is_cut:
                path, _ = self._place()
                raise FxshardError(
                    f"{path or 'the model'} is a part of a program, {what}: of {joined(path, name)} this rank holds a "
                    f"part ({layout})",
                    fix=fix,
                )

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        path, _ = self._place()
        refuse(
            f"a hook on {path or 'the model'} would never run: the program does not call its modules",
            "return what you look for from the model's forward, or give the hook to the model before parallelize: what "
            "it computes is captured with the model (what it collects is not)",
        )

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse_hook

    def _refuse_adding(self, name: str, *args: Any, **kwargs: Any) -> NoReturn:
        path, _ = self._place()
        refuse(f"nothing can be added to {path or 'a program'} ({name!r})", "change the model, and parallelize again")

    register_parameter = register_buffer = add_module = register_module = _refuse_adding

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """``to``, ``half``, ``cuda``: nothing that would change a tensor's dtype or device."""
        assert isinstance(self, nn.Module)
        check_unmoved(self, function)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.load_state_dict``, unless weights are parts."""
        self._check_whole("and cannot be loaded by itself", "program.load_state_dict(...) takes whole tensors")
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def share_memory(self) -> Any:
        """As ``nn.Module.share_memory``."""
        share_memory(self)  # type: ignore[arg-type]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """A part by itself is nothing."""
        path, _ = self._place()
        refuse(f"{path} is a part of a program, and cannot be copied", "copy the program")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Nor can it be pickled."""
        path, _ = self._place()
        refuse(f"{path} is a part of a program, and cannot be pickled", "save full_state_dict(), or save_checkpoint")


def share_memory(module: nn.Module) -> None:
    """Moves what a rank holds to memory that processes share, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.share_memory_()


def check_unmoved(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raises where a function that ``nn.Module`` applies to its tensors would change their dtype or device."""
    for kind in {(tensor.dtype, tensor.device) for tensor in (*module.parameters(), *module.buffers())}:
        made = function(torch.empty(0, dtype=kind[0], device=kind[1]))
        if (made.dtype, made.device) != kind:
            refuse(
                f"a program of {kind[0]} on {kind[1]} cannot become one of {made.dtype} on {made.device}: its code was "
                "made for the first",
                "give the model its dtype and device before parallelize",
            )


@functools.cache
def _class_of(cls: Any) -> type:
    """The class of the modules that stand for those of ``cls``."""

    @functools.wraps(cls.forward)
    def forward(self: Mirror, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    return type(cls.__name__, (Mirror, cls), own)


def mirror(model: nn.Module, rank_module: nn.Module, listener: Listener) -> nn.Module:
    """The modules of a model, holding what ``rank_module`` holds under the same names.

    Args:
        model: the model.
        rank_module: a rank's parts. The result has its very tables of them: what changes there, changes here.
        listener: is told of changes.
    """
    made: dict[int, nn.Module] = {}

    def build(module: nn.Module, path: str, parts: nn.Module | None) -> nn.Module:
        if id(module) not in made:
            made[id(module)] = _instance(module, path, parts, listener)
            children = made[id(module)]._modules
            for name, child in module._modules.items():
                held = parts._modules.get(name) if parts is not None else None
                shown = None if child is None else build(child, joined(path, name), held)
                dict.__setitem__(children, name, shown)
        return made[id(module)]

    return build(model, "", rank_module)


def _instance(module: nn.Module, path: str, parts: nn.Module | None, listener: Listener) -> nn.Module:
    cls: Any = type(module)
    try:
        if isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
            raise TypeError("their classes are made for each")
        made: Any = object.__new__(_class_of(cls))
    except TypeError:  # a class that cannot be derived from, or made so
        made = object.__new__(_class_of(Container))
    fresh = nn.Module()
    state: dict[str, Any] = {**vars(fresh), **{k: v for k, v in vars(module).items() if k not in _OF_MODULES}}
    state["training"] = module.training
    state["_non_persistent_buffers_set"] = module._non_persistent_buffers_set
    tables: Mapping[str, Any] = vars(parts) if parts is not None else vars(fresh)
    state["_parameters"], state["_buffers"] = tables["_parameters"], tables["_buffers"]
    state["_modules"] = Fixed(path)
    made.__dict__.update(state)
    made.__dict__[_BOUND] = path, listener
    return made  # type: ignore[no-any-return]
