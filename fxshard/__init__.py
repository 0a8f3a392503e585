"""fxshard: a compiler that takes an unmodified PyTorch model and a short plan, and returns every rank's program."""

from torch.distributed.tensor import Partial, Replicate, Shard

from fxshard.api import parallelize
from fxshard.errors import FxshardError
from fxshard.gradients import clip_grad_norm_, grad_norm
from fxshard.inspect.prove import check_rule
from fxshard.mesh import Mesh
from fxshard.plan.plan import (
    Plan,
    context_parallel,
    data_parallel,
    expert_parallel,
    sequence_parallel,
    tensor_parallel,
    zero,
)
from fxshard.program import ParallelModule
from fxshard.rules.table import register_rule
from fxshard.runtime.scaler import GradScaler
from fxshard.simulate import Simulation, simulate
from fxshard.verify import VerifyReport, verify

__all__ = [
    "FxshardError",
    "GradScaler",
    "Mesh",
    "ParallelModule",
    "Partial",
    "Plan",
    "Replicate",
    "Shard",
    "Simulation",
    "VerifyReport",
    "check_rule",
    "clip_grad_norm_",
    "context_parallel",
    "data_parallel",
    "expert_parallel",
    "grad_norm",
    "parallelize",
    "register_rule",
    "sequence_parallel",
    "simulate",
    "tensor_parallel",
    "verify",
    "zero",
]
