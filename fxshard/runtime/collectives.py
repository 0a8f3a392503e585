"""The differentiable collectives: all communication of a generated program goes through this one file.

The forward type decides the backward one (``g`` is a gradient):

    function                    forward                       backward of g
    vary(x, axis)               x                             all_reduce(g)        Megatron's f
    vary_weight(w, axis, ..)    w                             all_reduce(g)        in buckets: see ``training.buckets``
    all_reduce(x, axis)         sum over the ranks            g                    Megatron's g
    all_gather(x, axis, dim=d)  parts joined along d          this rank's part of g
    all_gather(.., summed=True) parts joined along d          reduce_scatter(g)
    reduce_scatter(x, axis, d)  this rank's part of the sum   all_gather(g)
    gather_weight(w, axis, ..)  the whole weight              as all_gather; the backward pass gathers it once more
    chunk(x, axis, d)           this rank's part              all_gather(g)
    all_to_all(x, axis, i, j)   parts along i -> parts of j   all_to_all(g, j, i)

So a backward pass is made of the same functions, the gradient of each is the other of its pair, and it can be
differentiated again (``create_graph=True``).

Sums are made in the dtype of what is summed, each addition rounded to it, or, where the program asks for it
(``reduce_dtype``), in a wider one, and rounded once. They are made in place where the compiler found that nothing else
reads the summands (``inplace``).

Where the ranks hold different sizes (``lengths``), parts are padded before a collective and cut after it, so that all
ranks bring the same shape; the padding is zeros, and nothing reads it. Such parts, and those of several blocks, travel
stacked along dim 0, and are put in their places behind.

An ``Axis`` is one mesh axis as one rank sees it. Its ``group`` does the work: a ``ProcessGroup`` of torch.distributed,
or the lockstep group of ``fxshard.simulate``, whose ranks are threads of this process.

Reference: Megatron-LM (Shoeybi et al., 2019), section 3; Korthikanti et al., 2022, for reduce-scatter and all-gather.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fxshard.errors import DistributedError, DivisibilityError
from fxshard.ranks.faults import guarded
from fxshard.runtime.autocast import operator_named
from fxshard.runtime.regather import Gathering
from fxshard.runtime.rounds import Arrival, Joint, OnRank, Rotation, turn
from fxshard.torch_internals import is_recorded, record

Blocks = tuple[int, ...]
Lengths = tuple[int, ...]


class Group(Protocol):
    """What an axis communicates through.

    Attributes:
        deferred: (identity of a weight, axes) -> what ``vary_weight`` does with it, if its gradient goes to a bucket.
        regather: what keeps account of gathered weights, if the backward pass gathers them again.
        packed: identity of a weight -> how it is gathered, if it is together with others.
    """

    deferred: dict[tuple[int, tuple[str, ...]], Callable[[torch.Tensor], torch.Tensor]]
    regather: Gathering | None
    packed: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]

    def run(self, name: str, backward: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """Runs the collective ``name``, whose gradient is the collective ``backward``; an all-reduce perhaps in place.

        Args:
            name: the collective.
            backward: that of the gradient.
            x: what this rank brings.
            inplace: nothing else reads the memory of ``x``, or, where the gradient is all-reduced, of that.
            dim: along which the parts of all ranks lie in the whole, where one of the two joins or cuts them.
        """

    def joint(self, function: Joint, *inputs: torch.Tensor) -> torch.Tensor:
        """Runs a function that the ranks compute together, each on inputs of its own."""


@dataclass(frozen=True)
class Axis:
    """One mesh axis, as one rank sees it: its name, its size, where this rank stands, and its group."""

    name: str
    size: int
    index: int
    group: Group


def sum_dtype(name: str, dtype: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype in which the collective ``name`` communicates values of ``dtype``.

    >>> sum_dtype("all_reduce", torch.bfloat16, torch.float32), sum_dtype("all_gather", torch.bfloat16, torch.float32)
    (torch.float32, torch.bfloat16)
    """
    sums = name in ("all_reduce", "reduce_scatter") and dtype.is_floating_point
    return asked if sums and asked is not None and asked.itemsize > dtype.itemsize else dtype


def vary(x: torch.Tensor, axis: Axis, inplace: bool = False) -> torch.Tensor:
    """Marks a replicated value whose readers differ by rank: its gradients are summed over the axis.

    Args:
        x: the value.
        axis: the mesh axis.
        inplace: nothing else reads the memory of the gradient.
    """
    return axis.group.run("identity", "all_reduce", x, inplace)


def vary_weight(weight: torch.Tensor, *axes: Axis) -> torch.Tensor:
    """``vary`` over one or more axes of a weight that is read in no other way: its gradient may wait for others."""
    deferred = axes[0].group.deferred
    if deferred and torch.is_grad_enabled():
        defer = deferred.get((id(weight), tuple(axis.name for axis in axes)))
        if defer is not None:
            return defer(weight)
    for axis in axes:
        weight = vary(weight, axis)
    return weight


def all_reduce(x: torch.Tensor, axis: Axis, inplace: bool = False) -> torch.Tensor:
    """The sum of ``x`` over the axis.

    Args:
        x: this rank's summand.
        axis: the mesh axis.
        inplace: nothing else reads the memory of ``x``.
    """
    return axis.group.run("all_reduce", "identity", x, inplace)


def all_gather(
    x: torch.Tensor,
    axis: Axis,
    summed: bool = False,
    dim: int = 0,
    blocks: Blocks = (1,),
    lengths: Lengths = (),
) -> torch.Tensor:
    """The whole tensor from the parts of all ranks.

    Args:
        x: this rank's part.
        axis: the mesh axis.
        summed: the gradient differs by rank and must be summed (its backward is a reduce_scatter).
        dim: the dim along which the whole is cut.
        blocks: the relative sizes of the blocks that are each cut alike.
        lengths: what each rank holds, in rank order; empty where all hold the same.
    """
    backward = "reduce_scatter" if summed else "own_part"
    if blocks == (1,) and not lengths:
        return axis.group.run("all_gather", backward, x, dim=dim)
    padded = _pad(x, dim, max(lengths)) if lengths else x
    return put_in_place(axis.group.run("all_gather", backward, padded), axis.size, dim, blocks, lengths)


def by_rank(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Parts stacked along dim 0, in a dim of their own: ``[n * d0, ...] -> [n, d0, ...]``."""
    return x.view(axis.size, x.shape[0] // axis.size, *x.shape[1:])


def _pad(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros((*x.shape[:dim], missing, *x.shape[dim + 1 :]))], dim)


def put_in_place(x: torch.Tensor, size: int, dim: int, blocks: Blocks = (1,), lengths: Lengths = ()) -> torch.Tensor:
    """``size`` parts stacked along dim 0 -> the whole tensor along ``dim``, block by block."""
    parts = list(x.chunk(size, 0))
    if lengths:
        parts = [part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)]
    if blocks == (1,):
        return torch.cat(parts, dim)
    cut = [part.split([b * part.shape[dim] // sum(blocks) for b in blocks], dim) for part in parts]
    return torch.cat([piece[i] for i in range(len(blocks)) for piece in cut], dim)


def gather_weight(
    weight: torch.Tensor,
    axis: Axis,
    summed: bool = False,
    dim: int = 0,
    blocks: Blocks = (1,),
    lengths: Lengths = (),
) -> torch.Tensor:
    """A whole weight from its parts, for use here: ``all_gather``.

    Where the program runs with ``regather``, the whole is not kept for the backward pass, which gathers it once more.
    Small weights are gathered together: see ``runtime.packs``.
    """
    packed = axis.group.packed.get(id(weight)) if axis.group.packed else None
    if packed is not None:
        return packed(weight)

    def gather() -> torch.Tensor:
        return all_gather(weight, axis, summed, dim, blocks, lengths)

    if axis.group.regather is None or not torch.is_grad_enabled():
        return gather()
    return axis.group.regather.gather(gather, weight)


def _parts(x: torch.Tensor, axis: Axis, dim: int, blocks: Blocks, lengths: Lengths) -> list[torch.Tensor]:
    """What each rank gets of a whole tensor along ``dim``."""
    if lengths and (blocks == (1,) or x.shape[dim] == 0):
        return list(x.split(list(lengths), dim))
    unit = x.shape[dim] // sum(blocks)
    shares = lengths or (1,) * axis.size
    pieces = sum(shares)
    if x.shape[dim] % sum(blocks) or any(block * unit * share % pieces for block in blocks for share in shares):
        raise DivisibilityError(
            f"dim {dim} of size {x.shape[dim]} cannot be split over mesh axis {axis.name!r} (size {axis.size})",
            fix=f"choose a size that {axis.size * sum(blocks)} divides",
        )
    if blocks == (1,):
        return list(x.chunk(axis.size, dim))
    cut = [
        block.split([block.shape[dim] * share // pieces for share in shares], dim)
        for block in x.split([b * unit for b in blocks], dim)
    ]
    return [torch.cat([block[i] for block in cut], dim) for i in range(axis.size)]


def _is_even(x: torch.Tensor, axis: Axis, dim: int, blocks: Blocks, lengths: Lengths) -> bool:
    """Whether the parts of a whole tensor along ``dim`` are of one size, and each is one piece."""
    return blocks == (1,) and not lengths and x.shape[dim] % axis.size == 0


def stack_parts(x: torch.Tensor, axis: Axis, dim: int, blocks: Blocks, lengths: Lengths) -> torch.Tensor:
    """The inverse of ``put_in_place``: the whole tensor -> the parts of all ranks, padded, stacked along dim 0."""
    if dim == 0 and _is_even(x, axis, dim, blocks, lengths):
        return x
    parts = _parts(x, axis, dim, blocks, lengths)
    return torch.cat([_pad(part, dim, max(lengths)) for part in parts] if lengths else parts, 0)


def chunk(x: torch.Tensor, axis: Axis, dim: int, blocks: Blocks = (1,), lengths: Lengths = ()) -> torch.Tensor:
    """This rank's part of a replicated tensor along ``dim``.

    Args:
        x: the whole tensor.
        axis: the mesh axis.
        dim: the dim to cut.
        blocks: the relative sizes of the blocks that are each cut alike.
        lengths: what each rank gets, in rank order; empty where all get the same.
    """
    is_even = _is_even(x, axis, dim, blocks, lengths)
    if x.requires_grad and torch.is_grad_enabled():
        if is_even:
            return axis.group.run("own_part", "all_gather", x, dim=dim)
        part = axis.group.run("own_part", "all_gather", stack_parts(x, axis, dim, blocks, lengths))
        return part.narrow(dim, 0, lengths[axis.index]) if lengths else part
    if not is_even:
        return _parts(x, axis, dim, blocks, lengths)[axis.index].contiguous()
    length = x.shape[dim] // axis.size
    return x.narrow(dim, axis.index * length, length).contiguous()  # its readers may view it as they viewed the whole


def reduce_scatter(x: torch.Tensor, axis: Axis, dim: int, blocks: Blocks = (1,), lengths: Lengths = ()) -> torch.Tensor:
    """This rank's part, along ``dim``, of the sum of ``x`` over the axis; the arguments are those of ``chunk``."""
    if _is_even(x, axis, dim, blocks, lengths):
        return axis.group.run("reduce_scatter", "all_gather", x, dim=dim)
    part = axis.group.run("reduce_scatter", "all_gather", stack_parts(x, axis, dim, blocks, lengths))
    return part.narrow(dim, 0, lengths[axis.index]) if lengths else part


def all_to_all(
    x: torch.Tensor, axis: Axis, source: int, target: int, lengths: tuple[Lengths, Lengths] = ((), ())
) -> torch.Tensor:
    """Split along ``source`` -> split along ``target``; ``lengths``: what each rank holds of the one and the other."""
    before, after = lengths
    if before:
        x = _pad(x, source, max(before))
    out = axis.group.run("all_to_all", "all_to_all", stack_parts(x, axis, target, (1,), after))
    whole = put_in_place(out, axis.size, source, (1,), before)
    return whole.narrow(target, 0, after[axis.index]) if after else whole


def offset(axis: Axis, size: int) -> int:
    """Where this rank's part begins, of a dim of ``size``."""
    return axis.index * (size // axis.size)


FAR = 2**31 - 1
"""More than any index."""


def least_index(axis: Axis) -> int:
    """The least index, counted within this rank's part, that this rank looks up: the first one takes what is below 0.

    It has no such row, and raises, as one device does.
    """
    return 0 if axis.index else -FAR


def index_bound(axis: Axis, size: int) -> int:
    """Above all indices, counted within this rank's part, that this rank looks up: the last one takes all behind."""
    return size // axis.size if axis.index < axis.size - 1 else FAR


def local_index(index: int, axis: Axis, size: int) -> int:
    """``index`` counted within this rank's part; -1 where another rank holds it."""
    local = index - offset(axis, size)
    return local if 0 <= local < size // axis.size else -1


class ProcessAxisGroup:
    """A process group of torch.distributed along one mesh axis."""

    def __init__(self, group: dist.ProcessGroup, reduce_dtype: torch.dtype | None = None, axis: str = "") -> None:
        # weakly: destroy_process_group must be able to end the group's threads before the interpreter does
        self.reference = weakref.ref(group)
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self.axis = axis
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.reduce_dtype = reduce_dtype
        self.deferred: dict[tuple[int, tuple[str, ...]], Callable[[torch.Tensor], torch.Tensor]] = {}
        self.regather: Gathering | None = None
        self.packed: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; ``DistributedError`` once it was destroyed."""
        group = self.reference()
        if group is None:
            raise DistributedError(
                "the process group of this program was destroyed", fix="call the program before destroy_process_group()"
            )
        return group

    def run(self, name: str, backward: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """See ``Group.run``."""
        if not is_recorded(x):
            return x if name == "identity" else self.raw(name, x, inplace, dim)
        if inplace and name == "all_reduce" and self.sums_in_place(x):
            self.raw(name, x.detach(), inplace)  # behind autograd's back: the gradient of the sum is that of x
            return self.pass_back(x)
        out: torch.Tensor = record(_Collective, x, self, name, backward, inplace, dim)
        return out

    def pass_back(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, a sum that was made in place; its gradient is differentiated as that of any sum (``create_graph``)."""
        if x.requires_grad:
            x.register_hook(lambda grad: self.run("identity", "all_reduce", grad) if torch.is_grad_enabled() else None)
        return x

    def sums_in_place(self, x: torch.Tensor) -> bool:
        """Whether ``x`` can be overwritten with its sum, if it may be."""
        return self.reduce_dtype is None and x.is_contiguous()

    def joint(self, function: Joint, *inputs: torch.Tensor) -> torch.Tensor:
        """See ``Group.joint``."""
        out: torch.Tensor = OnRank.apply(function, self.index, self.size, self._rotate, *inputs)  # type: ignore[no-untyped-call]
        return out

    def _rotate(self, rotation: Rotation) -> Arrival:
        arrive = turn(self.group, rotation)

        def wait() -> Sequence[torch.Tensor]:
            with guarded(self, "rotate", rotation.tensors[0]):
                return arrive()

        return wait

    def raw(self, name: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """Runs one collective without a gradient; an all-reduce ``inplace``, where that can be."""
        if name in _LOCAL:
            return _RAW[name](self, x, dim)
        with guarded(self, name, x):
            if self.reduce_dtype is not None:
                return _RAW[name](self, x.to(sum_dtype(name, x.dtype, self.reduce_dtype)), dim).to(x.dtype)
            return _RAW["all_reduce_" if inplace and name == "all_reduce" and x.is_contiguous() else name](self, x, dim)

    def begin(self, name: str, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begins a collective along dim 0, without a gradient; what it returns waits for it.

        An all_reduce is in place where ``x`` is contiguous, and of the dtype in which sums are made.
        """
        wide = x.to(sum_dtype(name, x.dtype, self.reduce_dtype)).contiguous()
        with guarded(self, name, wide):
            if name == "all_reduce":
                out, work = wide, dist.all_reduce(wide, group=self.group, async_op=True)
            elif name == "all_gather":
                out = wide.new_empty((wide.shape[0] * self.size, *wide.shape[1:]))
                work = dist.all_gather_single(out, wide, group=self.group, async_op=True)
            elif name == "all_to_all":
                out = torch.empty_like(wide)
                work = dist.all_to_all_single(out, wide, group=self.group, async_op=True)
            else:
                out = wide.new_empty((wide.shape[0] // self.size, *wide.shape[1:]))
                work = dist.reduce_scatter_single(out, wide, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            with guarded(self, name, wide):
                work.wait()
            return out.to(x.dtype)

        return wait


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: ProcessAxisGroup, name: str, backward: str, inplace: bool, dim: int
    ) -> torch.Tensor:
        ctx.group, ctx.name, ctx.backward_name, ctx.inplace, ctx.dim = group, name, backward, inplace, dim
        return x.view_as(x) if name == "identity" else group.raw(name, x, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group: ProcessAxisGroup = ctx.group
        if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient is the collective itself
            return group.run(ctx.backward_name, ctx.name, grad, dim=ctx.dim), None, None, None, None, None
        return group.raw(ctx.backward_name, grad, ctx.inplace, ctx.dim), None, None, None, None, None


def _identity(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    return x


def _all_reduce_(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    dist.all_reduce(x, group=group.group)
    return x


def _all_reduce(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    return _all_reduce_(group, x.clone(memory_format=torch.contiguous_format), dim)


def _all_gather(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    out = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    dist.all_gather_single(out, x.contiguous(), group=group.group)
    return joined(out, group.size, dim)


def _reduce_scatter(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    x = stacked(x, group.size, dim)
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    dist.reduce_scatter_single(out, x.contiguous(), group=group.group)
    return out


def _all_to_all(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group.group)
    return out


def _own_part(group: ProcessAxisGroup, x: torch.Tensor, dim: int) -> torch.Tensor:
    part = x.chunk(group.size, dim)[group.index]
    return part.contiguous() if dim else part  # its readers may view it as they viewed the whole


def joined(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """``size`` parts stacked along dim 0, joined along ``dim``."""
    return torch.cat(x.chunk(size), dim) if dim else x


def stacked(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The inverse of ``joined``."""
    return torch.cat(x.chunk(size, dim)) if dim else x


_RAW: dict[str, Callable[[ProcessAxisGroup, torch.Tensor, int], torch.Tensor]] = {
    "identity": _identity,
    "all_reduce": _all_reduce,
    "all_reduce_": _all_reduce_,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "own_part": _own_part,
}
_LOCAL = ("identity", "own_part")


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, *operands: torch.Tensor) -> torch.Tensor:
        needed = ctx.needs_input_grad[2:]  # whose gradients depend on each other, on the ranks that have a part
        ctx.save_for_backward(*(x for x, needs in zip(operands, needed, strict=True) if needs))
        return operands[0].new_zeros(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        operands = ctx.saved_tensors
        flows = torch.is_grad_enabled()
        grads = iter([nothing([grad, *operands], tuple(x.shape), x.dtype, flows) for x in operands])
        return None, None, *(next(grads) if needs else None for needs in ctx.needs_input_grad[2:])


def nothing(
    operands: list[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, flows: bool = True
) -> torch.Tensor:
    """What a call adds on a rank that has no part in it: zeros, and zeros for the gradients of its operands.

    All operands stay connected: this rank must take part in the collectives that made them, and where a gradient
    flows, in those of their backward pass.
    """
    if not flows:
        return operands[0].new_zeros(shape, dtype=dtype)
    out: torch.Tensor = _Nothing.apply(shape, dtype, *operands)  # type: ignore[no-untyped-call]
    return out


def draw_apart(operator: str, arguments: list[Any], options: dict[str, Any], *axes: Axis) -> Any:
    """Calls an operator that draws random numbers, with a stream that only the ranks share that hold the same part.

    One number is drawn from the stream that all ranks share; with this rank's place on ``axes``, along which the values
    are split, it seeds the part's own.

    Args:
        operator: its path in ``torch.ops``, e.g. ``aten.dropout.default``.
        arguments: those by position.
        options: those by name.
        axes: along which the ranks hold different parts.
    """
    seed = int(torch.randint(2**31, ()))
    for axis in axes:
        seed = seed * axis.size + axis.index
    given = (x.device if isinstance(x, torch.Tensor) else x for x in (*arguments, *options.values()))
    devices = {each for each in given if isinstance(each, torch.device) and each.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        return operator_named(operator)(*arguments, **options)


def dropout_mask(like: torch.Tensor, shape: list[int], order: Sequence[int] | None, p: float) -> torch.Tensor:
    """The scaled keep-mask that dropout would draw for a whole tensor of ``shape``: 0 or 1 / (1 - p).

    Where it does not lie plainly in memory, ``order`` says which dims lie farthest apart.
    """
    if order is None:
        return torch.dropout(like.new_ones(shape), p, True)
    ones = like.new_ones([shape[dim] for dim in order])
    return torch.dropout(ones.permute([order.index(dim) for dim in range(len(order))]), p, True)
