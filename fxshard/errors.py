"""Every error fxshard raises, in one tree.

FxshardError
|- CaptureError          the model cannot be exported, or not faithfully
|- PlanError             the plan cannot be applied (also a ValueError)
|  |- DivisibilityError  a dim does not divide by the axis that should split it
|  `- MeshError          the mesh does not fit the plan or the running processes
|- InputError            inputs do not fit what was captured (also a ValueError)
|- RuleError             a rule is malformed or does not fit its operator (also a ValueError)
|- GradientError         gradients that cannot be measured (also a RuntimeError)
|- CheckpointError       a checkpoint or a state dict does not fit, or cannot be written (also a RuntimeError)
|- DistributedError      torch.distributed is not ready, or ranks died or differ (also a RuntimeError)
`- SoundnessError        a checked invariant of the compiler failed: a bug of fxshard, never silent
"""

from __future__ import annotations


class FxshardError(Exception):
    """The root of all errors of fxshard.

    The text says what happened, then one line each for the operator, the module, the source line
    and how to mend it; each part is an attribute as well.

    Args:
        what: one sentence, with the sizes.
        op: the operator and its result, e.g. ``aten.linear.default -> f32[4, 10]``.
        module: the path of the module in the user's model.
        source: the user's source line, e.g. ``model.py:6 in forward``.
        fix: how to mend it.
    """

    def __init__(
        self,
        what: str,
        *,
        op: str | None = None,
        module: str | None = None,
        source: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.op, self.module, self.source, self.fix = what, op, module, source, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("op", "module", "source", "fix"):
            text = getattr(self, label)
            if text:
                lines.append(f"  {label:<7} {text}")
        return "\n".join(lines)


class CaptureError(FxshardError):
    """The model cannot be exported, or its export would not compute what the model computes.

    Attributes:
        by_the_model: whether it stands for an error that the model's own code raised.
    """

    by_the_model = False


class PlanError(FxshardError, ValueError):
    """The plan names something that the model or the mesh does not have."""


class DivisibilityError(PlanError):
    """A dim whose size does not divide by the size of the mesh axis that should split it."""


class MeshError(PlanError):
    """The mesh does not fit the plan, or the number of running processes."""


class InputError(FxshardError, ValueError):
    """The inputs of a call do not fit what was captured."""


class RuleError(FxshardError, ValueError):
    """An operator's rule is malformed, or does not fit the call that it should describe."""


class GradientError(FxshardError, RuntimeError):
    """Gradients whose norm is asked for, and that have no values, or values that are not finite."""


class DistributedError(FxshardError, RuntimeError):
    """torch.distributed is not initialised, a rank died or hangs, or the ranks are about to run different things."""


class CheckpointError(FxshardError, RuntimeError):
    """A checkpoint or a state dict does not fit the model or the optimizer, or cannot be written or read."""


class SoundnessError(FxshardError):
    """The checker refused a rewritten graph: a bug of fxshard (or of a registered rule), caught before it ran."""
