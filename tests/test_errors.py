"""The text of every error class, and that the tree in the docstring is the tree in the code."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from fxshard import errors
from fxshard.errors import FxshardError

PARTS = {
    "op": "aten.linear.default -> f32[4, 10]",
    "module": "model.layers.0.mlp.up_proj (Linear)",
    "source": "model.py:6 in forward",
    "fix": "choose an axis size dividing 10, or replicate dim 1",
}

# One representative a class: what it is raised with, and the text that a user reads.
SNAPSHOTS: dict[type[FxshardError], tuple[str, dict[str, str], str]] = {
    errors.FxshardError: ("something went wrong", {}, "something went wrong"),
    errors.CaptureError: (
        "torch.export cannot capture ToyModel: data-dependent control flow",
        {"source": "model.py:6 in forward", "fix": "use torch.where"},
        """\
torch.export cannot capture ToyModel: data-dependent control flow
  source  model.py:6 in forward
  fix     use torch.where""",
    ),
    errors.PlanError: (
        "'model.layer.*.q_proj' matches nothing; the nearest are 'model.layers.0.q_proj'",
        {"fix": "name one that exists"},
        """\
'model.layer.*.q_proj' matches nothing; the nearest are 'model.layers.0.q_proj'
  fix     name one that exists""",
    ),
    errors.DivisibilityError: (
        "dim 1 of size 10 does not divide by 4, the size of mesh axis 'tp'",
        PARTS,
        """\
dim 1 of size 10 does not divide by 4, the size of mesh axis 'tp'
  op      aten.linear.default -> f32[4, 10]
  module  model.layers.0.mlp.up_proj (Linear)
  source  model.py:6 in forward
  fix     choose an axis size dividing 10, or replicate dim 1""",
    ),
    errors.MeshError: (
        "the mesh {dp: 2, tp: 2} needs 4 ranks, and 2 are running",
        {"fix": "torchrun --nproc-per-node 4"},
        """\
the mesh {dp: 2, tp: 2} needs 4 ranks, and 2 are running
  fix     torchrun --nproc-per-node 4""",
    ),
    errors.InputError: (
        "input_ids is i64[2, 17], and was captured as i64[2, 16]",
        {"module": "LlamaForCausalLM", "fix": "capture with dynamic_shapes"},
        """\
input_ids is i64[2, 17], and was captured as i64[2, 16]
  module  LlamaForCausalLM
  fix     capture with dynamic_shapes""",
    ),
    errors.RuleError: (
        "the rule 'm k, k n -> m q' gives q, which no operand has",
        {"op": "aten.mm.default"},
        """\
the rule 'm k, k n -> m q' gives q, which no operand has
  op      aten.mm.default""",
    ),
    errors.GradientError: (
        "the norm of the gradient is inf: gradients of 2 parameters, first 'up.weight', are infinite or no numbers",
        {"fix": "look at the loss, or skip the step"},
        """\
the norm of the gradient is inf: gradients of 2 parameters, first 'up.weight', are infinite or no numbers
  fix     look at the loss, or skip the step""",
    ),
    errors.CheckpointError: (
        "cannot load the state dict into MLP:\n  - up.weight is missing",
        {"fix": "give a state dict of this model"},
        """\
cannot load the state dict into MLP:
  - up.weight is missing
  fix     give a state dict of this model""",
    ),
    errors.DistributedError: (
        "torch.distributed is not initialised",
        {"fix": "start with torchrun, or use fxshard.simulate"},
        """\
torch.distributed is not initialised
  fix     start with torchrun, or use fxshard.simulate""",
    ),
    errors.SoundnessError: (
        "after localize: linear reads a Partial(sum) as if it were whole",
        {"op": "aten.linear.default -> f32[4, 10]", "source": "model.py:6 in forward"},
        """\
after localize: linear reads a Partial(sum) as if it were whole
  op      aten.linear.default -> f32[4, 10]
  source  model.py:6 in forward""",
    ),
}

# What `except` of the standard class catches too.
BUILTINS = {
    "PlanError": ValueError,
    "DivisibilityError": ValueError,
    "MeshError": ValueError,
    "InputError": ValueError,
    "RuleError": ValueError,
    "GradientError": RuntimeError,
    "CheckpointError": RuntimeError,
    "DistributedError": RuntimeError,
}


def error_classes() -> list[type[FxshardError]]:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass)]
    return [each for each in classes if issubclass(each, FxshardError)]


def test_every_class_has_a_snapshot() -> None:
    assert set(SNAPSHOTS) == set(error_classes())


@pytest.mark.parametrize("cls", SNAPSHOTS, ids=lambda cls: cls.__name__)
def test_text_and_attributes(cls: type[FxshardError]) -> None:
    what, parts, text = SNAPSHOTS[cls]
    error = cls(what, **parts)
    assert str(error) == text
    assert error.what == what
    for name in PARTS:
        assert getattr(error, name) == parts.get(name)


@pytest.mark.parametrize("cls", SNAPSHOTS, ids=lambda cls: cls.__name__)
def test_is_caught_by_its_root_and_by_the_standard_class(cls: type[FxshardError]) -> None:
    what, parts, _ = SNAPSHOTS[cls]
    standard = [builtin for builtin in cls.__mro__ if builtin in (ValueError, RuntimeError)]
    assert standard == [BUILTINS[name] for name in [cls.__name__] if name in BUILTINS]
    for caught in (FxshardError, *standard):
        with pytest.raises(caught, match=re.escape(what)):
            raise cls(what, **parts)


@pytest.mark.parametrize("cls", SNAPSHOTS, ids=lambda cls: cls.__name__)
def test_crosses_processes_unchanged(cls: type[FxshardError]) -> None:
    what, parts, text = SNAPSHOTS[cls]
    copy = pickle.loads(pickle.dumps(cls(what, **parts)))
    assert type(copy) is cls
    assert str(copy) == text
    assert (copy.what, copy.fix) == (what, parts.get("fix"))


def test_an_empty_part_is_left_out() -> None:
    assert str(FxshardError("what", op="", fix="do it")) == "what\n  fix     do it"


def test_a_part_may_be_set_on_the_way_up() -> None:
    error = FxshardError("what")
    error.source = "model.py:6 in forward"
    assert str(error) == "what\n  source  model.py:6 in forward"


def test_the_docstring_draws_the_tree() -> None:
    """Each class stands in the module's docstring, one step right of its base."""
    tree: dict[str, str] = {}
    open_branches: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"[ |`-]*?(\w+Error)\b", line):
            column, name = found.start(1), found.group(1)
            while open_branches and open_branches[-1][0] >= column:
                open_branches.pop()
            tree[name] = open_branches[-1][1] if open_branches else "Exception"
            open_branches.append((column, name))
    assert tree == {cls.__name__: cls.__bases__[0].__name__ for cls in error_classes()}
