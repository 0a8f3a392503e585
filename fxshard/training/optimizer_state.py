"""The state of an optimizer under the names of the parameters, in parts that any mesh can take.

In: a torch optimizer over a program's parameters, or over a plain module's. Out: what
``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` gives for a plain module,

    {"state": {"up.weight": {"exp_avg": DTensor, "step": tensor(3.)}}, "param_groups": [{"lr": ..., "params": [...]}]}

and back again. State of the shape of its parameter lies as the parameter does. State of another shape belongs to the
part and not to the parameter: where the parameter is cut it has no meaning on another mesh, unless it is one number,
the same on all ranks, or the state of an optimizer of whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxshard.ranks.agreement import gathered, refuse
from fxshard.ranks.devices import target_device
from fxshard.runtime.process_groups import checksum
from fxshard.torch_internals import pytree
from fxshard.training.optimizers import WholeMatrix
from fxshard.weights.checkpoint_parts import local_of
from fxshard.weights.weights import Weights

FIX_STATE = "use an optimizer that keeps state element by element, such as AdamW, or make it with program.whole_matrix"


def sharded_optimizer_state_dict(weights: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """See ``ParallelModule.sharded_optimizer_state_dict``."""
    refuse_simulation(weights)
    names = names_of(weights, optimizer)
    problems: list[str] = []
    state: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    for parameter, held in ((p, optimizer.state[p]) for p in trained):
        name = names[id(parameter)]
        state[name] = {}
        for key, value in held.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name][key] = weights.sharded(name, value)
                continue
            if not _is_one_number(value) and weights.layout(name).is_cut and not isinstance(optimizer, WholeMatrix):
                problems.append(_other_shape(weights, name, key, value))
            state[name][key] = value
            shared[f"{key} of {name}"] = checksum(value) if isinstance(value, torch.Tensor) else repr(value)
    refuse(problems, "cannot save the state of the optimizer:", FIX_STATE)
    refuse(_differing(shared), "cannot save the state of the optimizer:", FIX_STATE)
    groups = [
        {**{k: v for k, v in group.items() if k != "param_names"}, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def refuse_simulation(weights: Weights) -> None:
    """Raises ``CheckpointError`` where one process holds all ranks: an optimizer steps the parts of one of them."""
    problems = [f"its mesh {weights.mesh} is simulated in this process"] if weights.is_simulated else []
    refuse(problems, "the optimizer has the parameters of one rank only:", "leave the optimizer out, or use torchrun")


def names_of(weights: Weights, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The id of each of the optimizer's parameters -> its first name; ``CheckpointError`` for one of another model."""
    names = weights.parameters
    every = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [f"a parameter of shape {list(p.shape)}" for p in every if id(p) not in names]
    refuse(
        strange,
        "the optimizer holds parameters that are not those of the model:",
        "make the optimizer of program.parameters(), after anything that replaces them",
    )
    return names


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_one_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, bool | int | float | complex | str)


def _other_shape(weights: Weights, name: str, key: str, value: Any) -> str:
    what = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    return f"{key} of {name} is {what}; the parameter's is {list(weights.layout(name).shape)}, and it is split"


def _differing(shared: Mapping[str, Any]) -> list[str]:
    """What should be the same on all ranks and is not, a line each; collective."""
    every = gathered(dict(shared))
    names = dict.fromkeys(name for one in every for name in one)
    return [
        f"{name} is not the same on all ranks"
        for name in names
        if any(one.get(name) != every[0].get(name) for one in every)
    ]


def template(
    weights: Weights, optimizer: torch.optim.Optimizer, saved: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """State to load into, in this rank's parts, without a step of the optimizer.

    Args:
        weights: those of the model.
        optimizer: it says which parameters are trained.
        saved: what the checkpoint has, by parameter and key: meta tensors of the whole shape, and other values.

    Raises:
        CheckpointError: where saved state does not fit a parameter that is cut.
    """
    names = names_of(weights, optimizer)
    device = target_device(weights.tensors.values())
    out: dict[str, dict[str, Any]] = {}
    problems = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            layout = weights.layout(name)
            on = device if parameter.is_meta else parameter.device
            for key, value in saved.get(name, {}).items():
                made = value
                if isinstance(value, torch.Tensor) and tuple(value.shape) == layout.shape:
                    made = weights.sharded(name, torch.zeros(parameter.shape, dtype=value.dtype, device=on))
                else:
                    made = pytree.tree_map(lambda x: torch.zeros_like(x, device="cpu") if _is_tensor(x) else x, value)
                fits = tuple(getattr(value, "shape", ())) == layout.shape or _is_one_number(value)
                if layout.is_cut and not fits and not isinstance(optimizer, WholeMatrix):
                    problems.append(_other_shape(weights, name, key, value))
                out.setdefault(name, {})[key] = made
    refuse(problems, "cannot load the state of the optimizer:", FIX_STATE)
    return out


def load_optimizer_state_dict(weights: Weights, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives an optimizer the state and the parameter groups of ``sharded_optimizer_state_dict``.

    A group is found by the names of its parameters. The state's tensors become the optimizer's own.
    """
    names = names_of(weights, optimizer)
    found = matching_groups(weights, optimizer, state["param_groups"])
    numbers: dict[str, int] = {}
    groups = []
    for group, saved in zip(optimizer.param_groups, found, strict=True):
        held = [names[id(p)] for p in group["params"]]
        numbers |= {name: len(numbers) + i for i, name in enumerate(held)}
        settings = {k: v for k, v in {**group, **saved}.items() if k != "params"}
        groups.append({**settings, "params": [numbers[name] for name in held]})
    parts = {
        numbers[name]: {key: local_of(v) for key, v in held.items()} for name, held in state.get("state", {}).items()
    }
    optimizer.load_state_dict({"state": parts, "param_groups": groups})
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        held = optimizer.state.get(parameter, {})
        for key, part in parts.get(numbers[names[id(parameter)]], {}).items():
            if _is_tensor(part) and _is_tensor(held.get(key)) and held[key].dtype != part.dtype:
                held[key] = part.to(held[key].device)  # torch casts to the parameter's dtype; what was saved is right


def matching_groups(
    weights: Weights, optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The saved group of each of the optimizer's, found by the names of its parameters; collective."""
    names = names_of(weights, optimizer)
    saved = {frozenset(group["params"]): group for group in groups}
    every = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    problems = [_no_group(i, held, groups) for i, held in enumerate(every) if frozenset(held) not in saved]
    refuse(
        problems,
        "the optimizer's parameter groups are not those of the checkpoint:",
        "make the optimizer with the groups that it had when it was saved",
    )
    return [saved[frozenset(held)] for held in every]


def _no_group(index: int, held: list[str], groups: Sequence[Mapping[str, Any]]) -> str:
    near = set(max((group["params"] for group in groups), key=lambda names: len(set(held) & set(names)), default=()))
    more, less = sorted(set(held) - near)[:3], sorted(near - set(held))[:3]
    return f"group {index} of {len(held)} parameters: beside the nearest saved one it has {more} and lacks {less}"
