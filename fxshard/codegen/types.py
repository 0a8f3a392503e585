"""Types as people write them: ``f32[4, 16, 32]  tp: Shard(2)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxshard.ir.info import has_info, info_of, placed_beside
from fxshard.mesh import Mesh, RankMesh
from fxshard.placement import describe_all, is_grouped, is_shard, local_shape

DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "b8", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def describe_value(node: fx.Node, mesh: Mesh, along: int | None = None) -> str:
    """The type of a node's result as a rank holds it, e.g. ``f32[4, 16, 32]``; whole along the axis ``along``.

    A ``RankMesh`` says which rank; else it is the first one. ``~`` stands before a number of rows that is known when
    the program runs: as many as there would be if all groups were equal.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    shape: tuple[Any, ...] = tuple(value.shape)
    if has_info(node) and info_of(node).outputs:
        placed = placed_beside(info_of(node).placements, along)
        shape = local_shape(shape, placed, mesh.sizes, mesh.at if isinstance(mesh, RankMesh) else ())
        dims = {p.dim for p in placed if is_shard(p) and is_grouped(p)}
        shape = tuple(f"~{size}" if dim in dims else size for dim, size in enumerate(shape))
    return describe_type(value.dtype, shape)


def describe_type(dtype: torch.dtype, shape: Sequence[object]) -> str:
    """A dtype and a shape.

    >>> describe_type(torch.float32, (4, 16))
    'f32[4, 16]'
    """
    return f"{DTYPES.get(dtype, str(dtype))}[{', '.join(map(str, shape))}]"


def describe_local(node: fx.Node, mesh: Mesh) -> str:
    """The local type of a node's result, and its placements where it is not replicated."""
    text = describe_value(node, mesh)
    if text and has_info(node) and info_of(node).outputs:
        placed = describe_all(info_of(node).placements, mesh.names)
        text += f"  {placed}" if placed != "Replicate" else ""
    return text
