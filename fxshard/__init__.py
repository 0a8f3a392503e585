"""fxshard: a compiler that takes an unmodified PyTorch model and a short plan, and returns every rank's program."""

from torch.distributed.tensor import Partial, Replicate, Shard

from fxshard.api import parallelize
from fxshard.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fxshard.checkpoint.folders import latest_checkpoint
from fxshard.checkpoint.pretrained import load_pretrained, save_pretrained
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
from fxshard.proof.counting import Counts, count
from fxshard.proof.simulate import Simulation, simulate
from fxshard.proof.verify import VerifyReport, verify
from fxshard.rules.table import register_rule
from fxshard.training.scaler import GradScaler
from fxshard.weights.layout import layout_of

__all__ = [
    "Checkpoint",
    "Counts",
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
    "count",
    "data_parallel",
    "expert_parallel",
    "grad_norm",
    "latest_checkpoint",
    "layout_of",
    "load_checkpoint",
    "load_pretrained",
    "parallelize",
    "register_rule",
    "save_checkpoint",
    "save_pretrained",
    "sequence_parallel",
    "simulate",
    "tensor_parallel",
    "verify",
    "zero",
]
