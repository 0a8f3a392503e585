"""The models under the styles of DTensor, as the tutorials of PyTorch have them, and under those of transformers.

Reference: https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from benchmarks.handwritten import split_dim


def apply_styles(model: nn.Module, sequence: bool) -> nn.Module:
    """Splits a model in place with ``parallelize_module``.

    With ``sequence`` the result of a norm is gathered once for all its readers, and what lies between the pairs is
    plain tensors, each rank's part. In transformers' Llama it is DTensors: that model reads sizes from it.
    """
    is_llama = hasattr(model, "lm_head")
    between = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        if last == "embed_tokens":
            plan[path] = RowwiseParallel(
                input_layouts=Replicate(), output_layouts=between, use_local_output=not sequence
            )
        elif last == "lm_head":
            plan[path] = ColwiseParallel(output_layouts=Replicate())
        elif "norm" in last and sequence:
            plan[path] = SequenceParallel()
            whole[path] = PrepareModuleOutput(
                output_layouts=between, desired_output_layouts=Replicate(), use_local_output=False
            )
        elif isinstance(module, nn.Linear):
            local = not (sequence and is_llama)
            row = RowwiseParallel(output_layouts=between, use_local_output=local)
            plan[path] = row if split_dim(f"{path}.weight") else ColwiseParallel()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, plan)
    return parallelize_module(model, mesh, whole) if whole else model


def apply_transformers_styles(model: nn.Module) -> nn.Module:
    """Splits a model in place as ``from_pretrained(..., distributed_config=DistributedConfig(tp_size=2))`` does."""
    plan: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            row = split_dim(f"{path}.weight")
            style = "rowwise" if row else "colwise_gather_output" if path == "lm_head" else "colwise"
            plan |= dict.fromkeys((path, *(f"{path}.{name}" for name, _ in module.named_parameters())), style)
    return apply_tensor_parallelism(model, init_device_mesh("cpu", (2,)), plan)
