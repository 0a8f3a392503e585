"""Sample calls of every operator of the table: what the rules are proven on.

Sizes are multiples of 12 or 24 where a dim is to be split (2, 3 and 4 ranks, and two axes, divide them). float64.
"""

# ruff: noqa: E501 (the samples are a table)

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxshard.inspect.prove import Sample
from fxshard.rules.table import POINTWISE

aten = torch.ops.aten
D = torch.float64
Maker = Callable[[], list[Any]]
_makers: dict[str, Maker] = {}


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=D)


def pos(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=D) * 0.8 + 0.1


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def bools(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


def cplx(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex128)


def call(
    *args: Any, values: bool = True, gradients: bool = True, constants: tuple[int, ...] = (), **kwargs: Any
) -> Sample:
    """A sample; operands in ``constants`` are not differentiated."""
    return Sample(args, kwargs, values, gradients, constants)


def samples(*overloads: str) -> Callable[[Maker], Maker]:
    """Registers a maker of samples for overloads such as ``add.Tensor``."""

    def register(maker: Maker) -> Maker:
        for name in " ".join(overloads).split():
            assert name not in _makers, name
            _makers[name] = maker
        return maker

    return register


def overload(name: str) -> torch._ops.OpOverload:
    """The operator of a name such as ``add.Tensor``, or ``lib::op.default``."""
    library, _, name = f"aten::{name}".split("::", 1)[1].rpartition("::")
    packet, _, rest = name.partition(".")
    found = getattr(getattr(getattr(torch.ops, library or "aten"), packet), rest or "default")
    assert isinstance(found, torch._ops.OpOverload)
    return found


def all_samples() -> dict[str, Maker]:
    """Overload name -> a function that makes its samples; without those of libraries that are not installed."""
    from tests.rules import samples_more  # noqa: F401 (it registers its own)

    there = {name: "::" not in name or _installed(name.split("::")[0]) for name in _makers}
    return {name: maker for name, maker in _makers.items() if there[name] and _is_known(name)}


def _is_known(name: str) -> bool:
    """Whether this torch has an operator; what is deprecated goes."""
    return "::" in name or hasattr(torch.ops.aten, name.partition(".")[0])


def _installed(library: str) -> bool:
    """Whether a library is there; importing it makes its operators known."""
    return _LIBRARIES[library]()


def _transformers() -> bool:
    try:
        import transformers.integrations.moe  # noqa: F401
    except ImportError:
        return False
    return True


_LIBRARIES = {"transformers": _transformers}


# Pointwise: found from the schema, so that every overload is tried.

UNARY_SHAPES = ((12, 24), (24,), (1, 12), ())
BINARY_SHAPES = (
    ((12, 24), (12, 24)),
    ((12, 24), (24,)),
    ((12, 1), (1, 24)),
    ((4, 12, 6), (12, 1)),
    ((12,), ()),
    ((), (12,)),
)
INTEGER = {
    "bitwise_and",
    "gcd",
    "lcm",
    "bitwise_not",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "__and__",
    "__or__",
    "__xor__",
    "__lshift__",
    "__rshift__",
}
ABOVE_ONE = {"acosh", "mvlgamma", "special_zeta"}
RANDOM = {"rand_like", "randn_like", "bernoulli"}
NO_GRADIENT = RANDOM | {
    "igamma",
    "igammac",
    "special_gammainc",
    "special_gammaincc",
    "floor_divide",
    "heaviside",
    "special_zeta",
    "remainder",
}
UNUSUAL = {"bernoulli.p", "bernoulli.Tensor"}
# Arguments that the schema does not give a default for.
EXTRA: dict[str, tuple[Any, ...]] = {
    "full_like.default": (2.5,), "leaky_relu.default": (0.1,), "hardtanh.default": (-0.5, 0.5), "threshold.default": (0.3, 2.0),
    "mvlgamma.default": (2,), "div.Tensor_mode": ("floor",), "divide.Tensor_mode": ("trunc",),
    "div.Scalar_mode": ("floor",), "divide.Scalar_mode": ("trunc",), "round.decimals": (1,),
}  # fmt: skip
MODES = {"div.Tensor_mode", "divide.Tensor_mode", "div.Scalar_mode", "divide.Scalar_mode"}


def _pointwise_overloads() -> Iterator[str]:
    for name in POINTWISE.split():
        if "." in name:
            yield name
            continue
        for found in getattr(aten, name).overloads():
            arguments = getattr(getattr(aten, name), found)._schema.arguments
            tensors = any("Tensor" in str(a.type) for a in arguments)
            odd = any(
                a.is_out or str(a.type) in ("str", "Dimname", "List[Tensor]") or "Generator" in str(a.type)
                for a in arguments
            )
            odd = odd or f"{name}.{found}" in UNUSUAL
            if tensors and not odd and not any(a.alias_info and a.alias_info.is_write for a in arguments):
                yield f"{name}.{found}"


def _pointwise_samples(name: str) -> list[Sample]:
    operator = overload(name)
    packet = name.partition(".")[0]
    given = [a for a in operator._schema.arguments if not a.kwarg_only]
    tensors = [a for a in given if "Tensor" in str(a.type)]
    make: Callable[..., torch.Tensor] = pos
    if packet in INTEGER:
        make = lambda *shape: ints(7, *shape)  # noqa: E731
    elif packet in ABOVE_ONE:
        make = lambda *shape: pos(*shape) + 1.5  # noqa: E731
    shapes: list[tuple[tuple[int, ...], ...]]
    if len(tensors) == 1:
        shapes = [(s,) for s in UNARY_SHAPES]
    elif len(tensors) == 2:
        shapes = list(BINARY_SHAPES)
    else:
        shapes = [((12, 24), (12, 24), (24,)), ((12, 24), (1, 24), (12, 1)), ((12,), (), ())]
    out = []
    for several in shapes:
        left = iter(several)
        args: list[Any] = []
        for argument in given:
            if "Tensor" in str(argument.type):
                args.append(make(*next(left)))
            elif (
                str(argument.type) in ("number", "Scalar")
                or "Scalar" in str(argument.type)
                or "number" in str(argument.type)
            ):
                args.append(2 if packet in INTEGER or packet in ("polygamma",) else 0.25)
            elif name in EXTRA or argument.has_default_value():
                break
            elif str(argument.type) == "int":
                args.append(1)
            else:
                raise AssertionError((name, str(argument.type)))
        extra = EXTRA.get(name, ())
        if name in MODES:
            out.append(call(*args, rounding_mode=extra[0]))
            out.append(call(*args, rounding_mode=None))
        elif name == "round.decimals":
            out.append(call(*args, decimals=1))
        else:
            used = args[: len(tensors)] + list(extra) if extra else args
            out.append(call(*used, values=packet != "empty_like", gradients=packet not in NO_GRADIENT))
    return out


for _name in _pointwise_overloads():
    _makers[_name] = lambda name=_name: _pointwise_samples(name)  # type: ignore[misc]


@samples("add.Tensor", "sub.Tensor", "subtract.Tensor")
def _() -> list[Any]:
    same = [call(r(*a), r(*b)) for a, b in BINARY_SHAPES]
    more = [call(r(12, 24), r(24), alpha=3), call(r(12), 2.0), call(ints(9, 12), ints(9, 12)), call(r(12), ints(5, 12))]
    return [*same, *more, call(self=r(12, 4), other=r(4)), call(other=r(12), self=r(4, 12)), call(r(12), other=1.5)]


@samples("rsub.Tensor")
def _() -> list[Any]:
    return [*(call(r(*a), r(*b)) for a, b in BINARY_SHAPES), call(r(12, 24), r(24), alpha=3), call(r(12), ints(5, 12))]


@samples("gelu.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(12, 24), approximate="tanh")]


@samples("bernoulli.default")
def _() -> list[Any]:
    return [call(pos(12, 24), gradients=False)]


@samples("add.Scalar", "sub.Scalar", "subtract.Scalar", "rsub.Scalar")
def _() -> list[Any]:
    return [call(r(12, 4), 2.0), call(r(12), 3, 2), call(ints(9, 12), 2)]


@samples("mul.Tensor", "multiply.Tensor", "div.Tensor", "divide.Tensor", "true_divide.Tensor")
def _() -> list[Any]:
    same = [call(r(*a), pos(*b)) for a, b in BINARY_SHAPES]
    return [
        *same,
        call(r(12), 2.0),
        call(ints(9, 12) + 1, ints(9, 12) + 1),
        call(cplx(12), cplx(12)),
        call(other=pos(12), self=r(12)),
    ]


@samples("mul.Scalar", "multiply.Scalar", "div.Scalar", "divide.Scalar", "true_divide.Scalar")
def _() -> list[Any]:
    return [call(r(12, 4), 2.0), call(ints(9, 12), 3)]


@samples(
    "neg.default", "negative.default", "positive.default", "alias.default", "alias_copy.default", "detach.default",
    "lift_fresh.default", "lift_fresh_copy.default", "zeros_like.default", "resolve_neg.default", "conj.default",
    "resolve_conj.default",
)  # fmt: skip
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(24)), call(ints(9, 12)), call(cplx(12), gradients=False), call(r())]


@samples("_conj.default")
def _() -> list[Any]:
    return [call(cplx(12), gradients=False), call(cplx(12, 4), gradients=False)]


@samples("clone.default", "contiguous.default")
def _() -> list[Any]:
    x = r(2, 12, 4, 6)
    return [call(r(12, 24)), call(x.transpose(1, 3)), call(x, memory_format=torch.channels_last), call(ints(9, 12))]


@samples("real.default", "imag.default")
def _() -> list[Any]:
    return [call(cplx(12, 24)), call(cplx(12))]


@samples("lerp.Tensor")
def _() -> list[Any]:
    return [call(r(12, 24), r(12, 24), r(24)), call(r(12), r(4, 12), r())]


@samples("lerp.Scalar")
def _() -> list[Any]:
    return [call(r(12, 24), r(24), 0.3)]


@samples("where.self")
def _() -> list[Any]:
    return [
        call(bools(12, 24), r(12, 24), r(24)),
        call(bools(24), r(12, 1), r(12, 24)),
        call(bools(12), r(), r(12)),
        call(self=r(12), condition=bools(4, 12), other=r(12)),
    ]


@samples("where.ScalarOther")
def _() -> list[Any]:
    return [call(bools(12, 24), r(12, 24), 1.0), call(bools(24), r(12, 1), 0.0)]


@samples("where.ScalarSelf")
def _() -> list[Any]:
    return [call(bools(12, 24), 1.0, r(12, 24)), call(bools(24), 2.0, r(12, 1))]


@samples("where.Scalar")
def _() -> list[Any]:
    return [call(bools(12, 24), 1.0, 0.0)]


@samples("where.default")
def _() -> list[Any]:
    return [call(bools(12, 24)), call(torch.ones(12, dtype=torch.bool))]


@samples("copy.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(12, 24), gradients=False),
        call(r(12, 24), r(24), gradients=False),
        call(r(12), r(), gradients=False),
        call(ints(9, 12), ints(9, 12)),
    ]


@samples("fill.Scalar")
def _() -> list[Any]:
    return [call(r(12, 24), 3.0), call(ints(9, 12), 3)]


@samples("fill.Tensor")
def _() -> list[Any]:
    return [call(r(12, 24), r())]


@samples("zero.default")
def _() -> list[Any]:
    return [call(r(12, 24))]


@samples("masked_fill.Scalar")
def _() -> list[Any]:
    return [
        call(r(12, 24), bools(12, 24), 0),
        call(r(12, 24), bools(24), 0.0),
        call(r(12, 24), bools(12, 1), -1e9),
        call(r(12), bools(4, 12), 2.0),
        call(r(12), bools(12), float("-inf"), gradients=False),
        call(value=0.0, mask=bools(12), self=r(12)),
    ]


@samples("masked_fill.Tensor")
def _() -> list[Any]:
    return [call(r(12, 24), bools(24), r()), call(r(12), bools(12), torch.tensor(0.0, dtype=D))]


@samples("to.dtype")
def _() -> list[Any]:
    half = [
        call(r(12, 24), torch.float32, gradients=False),
        call(ints(9, 12), D),
        call(bools(12), D),
        call(r(12), torch.int64, gradients=False),
        call(r(12), torch.bool, gradients=False),
    ]
    return [
        call(r(12, 24), D),
        *half,
        call(r(12).float().double().float(), D, gradients=False),
        call(r(12), torch.complex128),
        call(ints(300, 12), torch.uint8),
    ]


@samples("to.other")
def _() -> list[Any]:
    return [
        call(ints(9, 12, 24), r(4)),
        call(r(12), r(12)),
        call(r(12, 24), ints(3, 24), gradients=False),
        call(r(12), r()),
    ]


@samples("to.device")
def _() -> list[Any]:
    return [call(r(12, 24), torch.device("cpu"), D), call(ints(9, 12), torch.device("cpu"), D)]


@samples("to.dtype_layout", "_to_copy.default")
def _() -> list[Any]:
    return [
        call(ints(9, 12, 24), dtype=D),
        call(r(12), dtype=torch.int64, gradients=False),
        call(r(12, 24)),
        call(r(12), device=torch.device("cpu")),
    ]


@samples("dropout.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), 0.5, True),
        call(r(4, 12, 6), 0.25, True),
        call(r(12, 24), 0.5, False),
        call(r(24, 12).t(), 0.5, True),
        call(train=True, p=0.5, input=r(12)),
    ]


@samples("prelu.default")
def _() -> list[Any]:
    return [
        call(r(6, 12), r(12)),
        call(r(6, 12, 4), r(12)),
        call(r(6, 12), r(1)),
        call(r(12), r(1)),
        call(r(12, 1, 6), r(1)),
    ]


@samples("new_ones.default", "new_zeros.default")
def _() -> list[Any]:
    return [call(r(12, 24), [4, 6]), call(ints(4, 12), [12], dtype=D), call(r(12), [])]


@samples("new_empty.default")
def _() -> list[Any]:
    return [call(r(12, 24), [4, 6], values=False)]


@samples("new_empty_strided.default")
def _() -> list[Any]:
    return [call(r(12, 24), [4, 6], [6, 1], values=False)]


@samples("new_full.default")
def _() -> list[Any]:
    return [call(r(12, 24), [4, 6], 2.0)]


@samples("mse_loss.default", "l1_loss.default", "smooth_l1_loss.default", "huber_loss.default")
def _() -> list[Any]:
    out = [call(r(12, 24), r(12, 24), reduction) for reduction in (0, 1, 2)]
    return [*out, call(r(12), r(12)), call(r(), r()), call(reduction=2, target=r(12), self=r(12))]


@samples("soft_margin_loss.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(12, 24), reduction, constants=(1,)) for reduction in (0, 1, 2)]


@samples("kl_div.default")
def _() -> list[Any]:
    return [call(r(12, 24), pos(12, 24), n) for n in (0, 1, 2)] + [call(r(12, 24), r(12, 24), 1, log_target=True)]


@samples("binary_cross_entropy.default")
def _() -> list[Any]:
    return [
        call(pos(12, 24), pos(12, 24), w, n, constants=(2,)) for n in (0, 1, 2) for w in (None, pos(24), pos(12, 24))
    ]


@samples("binary_cross_entropy_with_logits.default")
def _() -> list[Any]:
    out = [
        call(r(12, 24), pos(12, 24), w, p, n, constants=(2, 3))
        for n in (0, 1, 2)
        for w in (None, pos(24))
        for p in (None, pos(24))
    ]
    return [*out, call(r(12, 24), pos(12, 24), None, pos(12, 1), 1, constants=(2,))]


@samples("cosine_similarity.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(12, 24)),
        call(r(4, 12, 6), r(4, 12, 6), -1),
        call(r(4, 12, 6), r(4, 12, 6), 0),
        call(r(12, 1, 6), r(1, 4, 6), 2),
        call(r(4, 12, 6), r(12, 6), 2),
    ]


@samples("linalg_cross.default")
def _() -> list[Any]:
    return [call(r(12, 3), r(12, 3)), call(r(3, 12), r(3, 12), dim=0), call(r(12, 1, 3), r(1, 4, 3))]


@samples("cross.default")
def _() -> list[Any]:
    return [call(r(12, 3), r(12, 3), -1), call(r(12, 3), r(12, 3))]


def _dims(*shapes: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, int]]:
    for shape in shapes:
        for dim in range(-len(shape), len(shape)):
            yield r(*shape), dim


@samples("softmax.int", "log_softmax.int")
def _() -> list[Any]:
    out = [call(x, d) for x, d in _dims((12, 24), (4, 12, 6), (24,))]
    return [
        *out,
        call(r(12, 24), -1, D),
        call(r(12, 24).float(), -1, D, gradients=False),
        call(dim=0, self=r(12, 4)),
        call(r(), 0),
    ]


@samples("_softmax.default", "_log_softmax.default")
def _() -> list[Any]:
    return [call(x, d, False) for x, d in _dims((12, 24), (24,))]


@samples(
    "_safe_softmax.default",
    "cumprod.default",
    "logcumsumexp.default",
    "argsort.default",
    "cummax.default",
    "cummin.default",
    "sort.default",
)
def _() -> list[Any]:
    return [call(x, d) for x, d in _dims((12, 24), (4, 12, 6), (24,))]


@samples("cumsum.default")
def _() -> list[Any]:
    return [call(x, d) for x, d in _dims((12, 24), (24,))] + [
        call(r(12, 24), 0, dtype=torch.int64, gradients=False),
        call(bools(12, 24), -1),
        call(r(), 0),
    ]


@samples("sort.stable", "argsort.stable")
def _() -> list[Any]:
    return [call(x, stable=True, dim=d) for x, d in _dims((12, 24))]


@samples("topk.default")
def _() -> list[Any]:
    return [call(x, 3, d) for x, d in _dims((12, 24), (4, 12, 6))] + [
        call(r(12, 24), 5),
        call(r(12, 24), 24, largest=False),
    ]


@samples("glu.default")
def _() -> list[Any]:
    return [call(x, d) for x, d in _dims((12, 24), (4, 12, 6), (24,))] + [call(r(12, 24))]


@samples("flip.default")
def _() -> list[Any]:
    return [call(r(12, 24), [0]), call(r(12, 24), [-1]), call(r(4, 12, 6), [0, -1]), call(r(12), [])]


@samples("roll.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), [2], [0]),
        call(r(12, 24), [1], [-1]),
        call(r(4, 12, 6), [1, 2], [0, 1]),
        call(r(12, 24), [3]),
    ]


@samples("diff.default")
def _() -> list[Any]:
    return [
        call(r(12, 24)),
        call(r(12, 24), 1, 0),
        call(r(12, 24), 2),
        call(r(12, 24), prepend=r(12, 1)),
        call(r(12, 24), 1, 0, None, r(2, 24)),
        call(ints(9, 12, 4), 1, -1),
    ]


@samples("renorm.default")
def _() -> list[Any]:
    return [call(r(12, 24), 2, 0, 1.0), call(r(12, 24), 2, -1, 1.0), call(r(4, 12, 6), 1, 1, 0.5)]


@samples("unfold.default")
def _() -> list[Any]:
    return [call(r(12, 24), 1, 4, 2), call(r(12, 24), 0, 3, 1), call(r(4, 12, 6), -2, 2, 2), call(r(12), 0, 12, 1)]


@samples("fft_fft.default", "fft_ifft.default", "fft_hfft.default", "fft_irfft.default")
def _() -> list[Any]:
    return [call(cplx(12, 24)), call(cplx(12, 24), None, 0), call(cplx(12, 24), 8, -1), call(cplx(4, 12, 6), None, 1)]


@samples("fft_rfft.default", "fft_ihfft.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(12, 24), None, 0), call(r(12, 24), 8, -1)]


@samples("fft_fft2.default", "fft_ifft2.default", "fft_irfft2.default")
def _() -> list[Any]:
    return [call(cplx(12, 4, 6)), call(cplx(4, 6, 12), None, [0, 1]), call(cplx(12, 4, 6), [4, 4])]


@samples("fft_rfft2.default")
def _() -> list[Any]:
    return [call(r(12, 4, 6)), call(r(4, 6, 12), None, [0, 1])]


@samples("fft_fftn.default", "fft_ifftn.default", "fft_irfftn.default")
def _() -> list[Any]:
    return [
        call(cplx(12, 4, 6)),
        call(cplx(12, 4, 6), [4]),
        call(cplx(12, 4, 6), None, [1, 2]),
        call(cplx(12, 6), None, [-1]),
    ]


@samples("fft_rfftn.default")
def _() -> list[Any]:
    return [call(r(12, 4, 6)), call(r(12, 4, 6), None, [1, 2])]


@samples("fft_fftshift.default", "fft_ifftshift.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(12, 24), [0]), call(r(12, 24), [-1])]


@samples(
    "sum.default",
    "mean.default",
    "amax.default",
    "amin.default",
    "std.default",
    "var.default",
    "nansum.default",
    "max.default",
    "min.default",
    "argmax.default",
    "argmin.default",
    "prod.default",
    "norm.Scalar",
    "linalg_vector_norm.default",
    "var_mean.default",
    "std_mean.default",
    "median.default",
    "nanmedian.default",
    "aminmax.default",
)
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(24)), call(r(4, 1, 12)), call(r(3, 5))]


@samples("all.default", "any.default", "count_nonzero.default")
def _() -> list[Any]:
    return [call(bools(12, 24)), call(ints(3, 24))]


@samples("sum.dim_IntList", "mean.dim", "nansum.dim_IntList_", "std.dim", "var.dim")
def _() -> list[Any]:
    x = [r(12, 24), r(12, 24), r(4, 12, 6), r(4, 12, 6), r(24)]
    dims: list[Any] = [[0], [-1], [0, -1], [-2], [0]]
    out = [call(a, d, keepdim=k) for a, d in zip(x, dims, strict=True) for k in (False, True)]
    return [
        *out,
        call(r(12, 24), None),
        call(r(12, 24), None, keepdim=True),
        call(r(12, 24), []),
        call(keepdim=True, dim=[1], self=r(12, 24)),
        call(r(12, 1), [1], keepdim=True),
    ]


_makers["nansum.default"] = lambda: [
    call(r(12, 24)),
    call(r(12, 24), [0]),
    call(r(12, 24), [-1], True),
    call(torch.where(bools(12, 24), r(12, 24), float("nan")), [0], gradients=False),
    call(r(12, 24), None),
]
del _makers["nansum.dim_IntList_"]
_SUM = _makers["sum.dim_IntList"]
_makers["sum.dim_IntList"] = lambda: [
    *_SUM(),
    call(r(12, 24), [0], dtype=torch.int64, gradients=False),
    call(bools(12, 24), [0]),
    call(ints(9, 12, 24), [1]),
    call(ints(9, 12, 24), [1], dtype=D),
    call(cplx(12, 4), [0]),
]
_makers["mean.dim"] = lambda: [
    *_SUM(),
    call(ints(9, 12, 24), [1], dtype=D),
    call(r(12, 24).float(), [0], dtype=D, gradients=False),
    call(cplx(12, 4), [0]),
]
_DIMS = lambda: [  # noqa: E731
    call(r(12, 24)),
    call(r(12, 24), dim=[0]),
    call(r(12, 24), dim=[-1], keepdim=True),
    call(r(4, 12, 6), dim=[0, 2]),
]


def _ties() -> torch.Tensor:
    """Every value several times, among them infinities; and a row of -inf."""
    x = ints(3, 12, 24).to(D)
    x[0, ::5], x[1, 3], x[2, 5:9], x[3] = float("inf"), -float("inf"), -float("inf"), -float("inf")
    return x


_makers["amax.default"] = _makers["amin.default"] = lambda: [
    *_DIMS(),
    *(call(_ties(), dim=d) for d in ([0], [1], [0, 1])),
    call(ints(9, 12, 24), dim=[1]),
    call(bools(12, 24), dim=[0]),
    call(torch.where(bools(12, 24) & bools(12, 24) & bools(12, 24), float("nan"), r(12, 24)), dim=[1], gradients=False),
]
_makers["linalg_vector_norm.default"] = lambda: [
    *_DIMS(),
    *(call(r(12, 24), p, [d], True) for p in (0, 0.5, 1, 3, float("inf"), -float("inf"), -1) for d in (0, 1)),
    call(ints(3, 12, 24).to(D), float("inf"), [1]),
    call(torch.zeros(12, 24, dtype=D), 2, [1]),
    call(cplx(12, 24), 2, [0]),
    call(cplx(12, 24), float("inf"), [0]),
]


@samples("count_nonzero.dim_IntList")
def _() -> list[Any]:
    return [call(bools(12, 24), [0]), call(ints(3, 12, 24), [-1]), call(r(4, 12, 6), [0, 1])]


_prod = _makers["prod.default"]
_makers["prod.default"] = lambda: [*_prod(), call(ints(3, 12)), call(ints(3, 4, 6), dtype=D), call(bools(12, 24))]


@samples("any.dim", "all.dim")
def _() -> list[Any]:
    return [call(bools(12, 24), 0), call(bools(12, 24), -1, True), call(ints(2, 4, 12, 6), 1)]


@samples("any.dims", "all.dims")
def _() -> list[Any]:
    return [
        call(bools(12, 24), [0]),
        call(bools(12, 24), [0, 1], True),
        call(bools(12, 24), None),
        call(bools(12, 24), []),
    ]


@samples("prod.dim_int", "argmax.dim_", "max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode.default")
def _() -> list[Any]:
    out = [call(x, d, k) for x, d in _dims((12, 24), (4, 12, 6), (24,)) for k in (False, True)]
    return [*out, call(r(12, 24), 1), call(ints(3, 12, 24).to(D), 1), call(ints(9, 12, 24), 0)]


for _name in ("max.dim", "min.dim"):
    _makers[_name] = lambda made=_makers[_name]: [  # type: ignore[misc]
        *made(),
        call(_ties(), 1),
        call(torch.where(bools(12, 24), float("nan"), r(12, 24)), 1, gradients=False),
    ]
del _makers["argmax.dim_"]
_makers["argmax.default"] = _makers["argmin.default"] = lambda: [
    call(r(12, 24)),
    call(_ties(), 1),
    call(ints(3, 12, 24), 0, True),
    call(r(12, 24), 0),
    call(r(12, 24), -1, True),
    call(r(12, 24), None, True),
]
_makers["aminmax.default"] = lambda: [call(r(12, 24)), call(r(12, 24), dim=0), call(r(12, 24), dim=-1, keepdim=True)]


@samples("kthvalue.default")
def _() -> list[Any]:
    return [call(x, 2, d, k) for x, d in _dims((12, 24), (24,)) for k in (False, True)] + [call(r(12, 24), 3)]


@samples("std.correction", "var.correction", "std_mean.correction", "var_mean.correction")
def _() -> list[Any]:
    return [
        call(r(12, 24), [0], correction=0),
        call(r(12, 24), [-1], correction=1, keepdim=True),
        call(r(12, 24), correction=1),
        call(r(4, 12, 6), [0, 1]),
        call(r(12, 24) + 100, [1], correction=2.5),
        call(torch.ones(12, 24, dtype=D), [1]),
        call(cplx(12, 24), [0], gradients=False),
    ]


@samples("var_mean.dim", "std_mean.dim")
def _() -> list[Any]:
    return [call(r(12, 24), [0]), call(r(12, 24), [-1], False, True), call(r(12, 24), None)]


@samples("norm.ScalarOpt_dim")
def _() -> list[Any]:
    return [call(r(12, 24), p, [d], k) for p in (None, 2, 1) for d in (0, -1) for k in (False, True)]


@samples("logsumexp.default")
def _() -> list[Any]:
    masked = r(12, 24)
    masked[:6, :12], masked[:3, 12:20] = -float("inf"), -float("inf")
    return [
        *(call(r(12, 24), [0]), call(r(12, 24), [-1], True), call(r(4, 12, 6), [0, 2]), call(masked, [1])),
        *(call(ints(9, 12, 24), [1]), call(r(12, 24) + 1000, [1]), call(_ties(), [1], gradients=False)),
    ]


@samples("layer_norm.default")
def _() -> list[Any]:
    return [
        call(r(12, 24, 6), [6]), call(r(12, 24, 6), [6], r(6), r(6)), call(r(12, 24, 6), [6], r(6)), call(r(12, 6), [6], None, r(6)),
        call(r(12, 4, 6), [4, 6], r(4, 6), r(4, 6)), call(r(6), [6]), call(r(6, 12) + 100, [12], r(12), r(12)), call(bias=r(6), input=r(12, 6), normalized_shape=[6], weight=r(6)),
    ]  # fmt: skip


@samples("native_layer_norm.default")
def _() -> list[Any]:
    return [call(r(12, 24, 6), [6], r(6), r(6), 1e-5), call(r(12, 4, 6), [4, 6], None, None, 1e-5)]


@samples("rms_norm.default")
def _() -> list[Any]:
    return [
        call(r(12, 24, 6), [6]),
        call(r(12, 24, 6), [6], r(6), 1e-6),
        call(r(12, 4, 6), [4, 6], r(4, 6)),
        call(r(12) / 1e8, [12]),
    ]


@samples("group_norm.default")
def _() -> list[Any]:
    out = [call(r(4, 24, 5), 12, w, b) for w, b in ((None, None), (r(24), None), (r(24), r(24)))]
    return [
        *out,
        call(r(12, 24, 2, 2), 4, r(24), r(24)),
        call(r(12, 6), 1),
        call(r(4, 24), 24),
        call(num_groups=12, input=r(2, 24, 3)),
        call(r(2, 12, 6), 1, r(12), r(12)),
        call(r(2, 24, 4), 2, r(24), r(24)),
        call(r(3, 24), 3, r(24), r(24)),
        call(r(2, 6, 4, 6) + 100, 3, r(6)),
    ]


@samples("batch_norm.default")
def _() -> list[Any]:
    rest = (0.1, 1e-5, False)
    out = [
        call(r(12, 24), w, b, r(24), pos(24), False, *rest, constants=(1, 2, 3, 4))
        for w, b in ((None, None), (r(24), r(24)), (None, r(24)), (r(24), None))
    ]
    out += [call(r(4, 12, 3, 3), r(12), r(12), r(12), pos(12), False, *rest, constants=(3, 4))]
    return [
        *out,
        call(r(12, 24, 2), r(24), r(24), None, None, True, *rest),
        call(r(12, 24), None, None, None, None, True, *rest),
        call(r(12, 24) + 100, r(24), r(24), r(24), pos(24), True, *rest, constants=(3, 4)),
        call(r(4, 2, 6, 2), r(2), None, None, None, True, *rest),
    ]


@samples("instance_norm.default")
def _() -> list[Any]:
    return [
        call(r(4, 12, 6), r(12), r(12), None, None, True, 0.1, 1e-5, False),
        call(r(4, 12, 3, 3), None, None, None, None, True, 0.1, 1e-5, False),
        call(r(4, 12, 6), None, None, r(12), pos(12), False, 0.1, 1e-5, False, constants=(1, 2)),
    ]


@samples("_weight_norm.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), pos(12, 1)),
        call(r(12, 24, 3), pos(12, 1, 1), 0),
        call(r(4, 12, 3), pos(1, 12, 1), 1),
        call(r(4, 12), pos(), -1),
        call(r(4, 3, 12), pos(1, 1, 12), 2),
    ]


def _targets(classes: int, *shape: int, ignore: int = -100) -> torch.Tensor:
    return torch.where(torch.rand(shape) < 0.3, ignore, ints(classes, *shape))


@samples("cross_entropy_loss.default")
def _() -> list[Any]:
    out = []
    for reduction, weight, smoothing in itertools.product((0, 1, 2), (None, pos(24)), (0.0, 0.1)):
        out.append(call(r(12, 24), _targets(24, 12), weight, reduction, -100, smoothing, constants=(2,)))
        out.append(call(r(12, 24, 4), _targets(24, 12, 4, ignore=3), weight, reduction, 3, smoothing, constants=(2,)))
    out += [
        call(r(12, 24), torch.softmax(r(12, 24), 1)),
        call(r(12, 24), torch.softmax(r(12, 24), 1), None, 2),
        call(r(24), ints(24)),
    ]
    return [
        *out,
        call(reduction=1, target=_targets(24, 12), self=r(12, 24)),
        call(r(12, 24, 2, 2), _targets(24, 12, 2, 2)),
    ]


@samples("nll_loss.default", "nll_loss_nd.default")
def _() -> list[Any]:
    out = [call(r(12, 24), _targets(24, 12), w, n, constants=(2,)) for n in (0, 1, 2) for w in (None, pos(24))]
    return [*out, call(r(12, 24), _targets(24, 12, ignore=5), pos(24), 1, 5, constants=(2,))]


@samples("linear.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(6, 24)),
        call(r(4, 12, 24), r(12, 24)),
        call(r(24), r(12, 24)),
        call(r(12, 24), r(6, 24), r(6)),
        call(weight=r(6, 24), input=r(12, 24)),
        call(r(12, 24), r(6, 24), bias=r(6)),
        call(r(12, 24), r(24)),
    ]


@samples("mm.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(24, 6)),
        call(r(1, 24), r(24, 6)),
        call(r(12, 1), r(1, 6)),
        call(ints(9, 12, 24), ints(9, 24, 6)),
    ]


@samples("bmm.default")
def _() -> list[Any]:
    return [call(r(4, 12, 24), r(4, 24, 6)), call(r(1, 12, 24), r(1, 24, 6))]


@samples("mv.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(24))]


@samples("dot.default", "vdot.default")
def _() -> list[Any]:
    return [call(r(24), r(24)), call(cplx(24), cplx(24))]


@samples("outer.default", "ger.default")
def _() -> list[Any]:
    return [call(r(12), r(24))]


@samples("cdist.default")
def _() -> list[Any]:
    return [call(r(12, 24, 3), r(12, 6, 3)), call(r(12, 3), r(24, 3), 1.0), call(r(4, 1, 12, 3), r(1, 6, 4, 3))]


@samples("matmul.default", "linalg_matmul.default")
def _() -> list[Any]:
    shapes = [((12, 24), (24, 6)), ((24,), (24,)), ((12, 24), (24,)), ((24,), (24, 6)), ((4, 12, 24), (24, 6)), ((12, 24), (4, 24, 6)),
              ((4, 12, 24), (4, 24, 6)), ((2, 1, 12, 24), (4, 24, 6)), ((4, 12, 24), (24,)), ((24,), (4, 24, 6)), ((1, 12, 24), (4, 24, 6))]  # fmt: skip
    return [call(r(*a), r(*b)) for a, b in shapes]


@samples("addmm.default")
def _() -> list[Any]:
    out = [call(r(*s), r(12, 24), r(24, 6)) for s in ((6,), (12, 6), (1, 6), (12, 1), (), (1,))]
    return [*out, call(r(6), r(12, 24), r(24, 6), beta=2, alpha=0.5), call(ints(5, 6), ints(5, 12, 24), ints(5, 24, 6))]


@samples("baddbmm.default")
def _() -> list[Any]:
    out = [call(r(*s), r(4, 12, 24), r(4, 24, 6)) for s in ((4, 12, 6), (12, 6), (6,), (1, 12, 1), (4, 1, 6), ())]
    return [
        *out,
        call(r(4, 12, 6), r(4, 12, 24), r(4, 24, 6), beta=0.5, alpha=2),
        call(r(4, 12, 6), r(4, 12, 24), r(4, 24, 6), beta=0),
    ]


@samples("einsum.default")
def _() -> list[Any]:
    return [
        call("ij,jk->ik", [r(12, 24), r(24, 6)]), call("bhqd,bhkd->bhqk", [r(2, 4, 6, 12), r(2, 4, 6, 12)]), call("ij,jk", [r(12, 24), r(24, 6)]),
        call("ii->i", [r(12, 12)]), call("ij->", [r(12, 24)]), call("...i,oi->...o", [r(4, 12, 24), r(6, 24)]), call("i,j->ij", [r(12), r(24)]),
        call("ij,k->k", [r(12, 4), r(6)]), call("b i d, j d -> b i j", [r(4, 12, 6), r(12, 6)]), call("abc,ac,c->b", [r(4, 12, 6), r(4, 6), r(6)]),
        call("ba,ac", [r(12, 24), r(24, 6)]), call("...ij,...jk->...ik", [r(4, 12, 24), r(24, 6)]), call("...i->i", [r(4, 12, 6)]), call("ij,jk->ik", [r(12, 1), r(24, 6)]),
    ]  # fmt: skip


@samples("embedding.default")
def _() -> list[Any]:
    return [
        call(r(24, 12), ints(24, 6, 4)), call(r(24, 12), ints(24, 12)), call(r(24, 12), ints(24, 12), 3), call(r(24, 12), ints(24, 12), 20),
        call(r(24, 12), ints(24)), call(r(24, 12), ints(24, 12), -1, True), call(r(24, 12), ints(4, 12), padding_idx=0), call(indices=ints(24, 12), weight=r(24, 6)),
    ]  # fmt: skip


def _convolutions(rank: int, transposed: bool) -> list[Any]:
    space, kernel = (5,) * rank, (3,) * rank

    def weight(c: int, o: int, groups: int) -> torch.Tensor:
        return r(c, o // groups, *kernel) if transposed else r(o, c // groups, *kernel)

    def build(c: int, o: int, groups: int, bias: bool, batch: tuple[int, ...] = (4,), **more: Any) -> Sample:
        return call(r(*batch, c, *space), weight(c, o, groups), r(o) if bias else None, groups=groups, **more)

    one = [1] * rank
    out = [
        build(12, 24, 1, False),
        build(12, 24, 1, True),
        build(12, 24, 12, True),
        build(12, 24, 4, False),
        build(12, 12, 12, False),
    ]
    return [
        *out,
        build(12, 24, 1, True, ()),
        build(12, 24, 12, True, ()),
        build(4, 12, 1, False, stride=[2] * rank, padding=one, dilation=one),
    ]


for _rank in (1, 2, 3):
    _makers[f"conv{_rank}d.default"] = lambda rank=_rank: _convolutions(rank, False)  # type: ignore[misc]
    _makers[f"conv{_rank}d.padding"] = lambda rank=_rank: [  # type: ignore[misc]
        call(r(4, 12, *[5] * rank), r(24, 12, *[3] * rank), b, padding=p)
        for p in ("same", "valid")
        for b in (None, r(24))
    ]
_makers["conv_transpose1d.default"] = lambda: _convolutions(1, True)
_makers["conv_transpose2d.input"] = lambda: _convolutions(2, True)
_makers["conv_transpose3d.input"] = lambda: _convolutions(3, True)


@samples("scaled_dot_product_attention.default")
def _() -> list[Any]:
    b, h, q, s, d = 4, 12, 6, 8, 4
    base = lambda: (r(b, h, q, d), r(b, h, s, d), r(b, h, s, d))  # noqa: E731
    masks = [
        r(q, s),
        r(b, 1, q, s),
        r(b, h, q, s),
        r(1, 1, q, s),
        r(h, q, s),
        bools(b, 1, q, s) | (torch.arange(s) == 0),
        r(b, 1, 1, s),
    ]
    gqa = lambda k: (r(b, h, q, d), r(b, k, s, d), r(b, k, s, d))  # noqa: E731
    own = lambda n=12, k=2: (r(1, 2, n, d), r(1, k, n, d), r(1, k, n, 3))  # noqa: E731 (a sequence to itself: a ring)
    rings = [
        call(*own()), call(*own(), is_causal=True, scale=0.3), call(*own(7), is_causal=True), call(*own(3), r(3, 3)),
        call(*own(12, 1), r(1, 2, 12, 12), enable_gqa=True), call(*own(7, 1), is_causal=True, enable_gqa=True),
        call(*own(), bools(1, 1, 12, 12)), call(*own(5), r(1, 1, 1, 5)), call(r(8, d), r(8, d), r(8, d)),
    ]  # fmt: skip
    return [
        *rings,
        call(*base()), call(*base(), is_causal=True), call(*base(), scale=0.3), *(call(*base(), m) for m in masks),
        call(r(b, h, q, d), r(b, h, s, d), r(b, h, s, 12)), call(*gqa(4), enable_gqa=True), call(*gqa(1), enable_gqa=True), call(*gqa(6), r(b, 1, q, s), enable_gqa=True),
        call(*gqa(4), is_causal=True, enable_gqa=True), call(*gqa(4), r(b, h, q, s), enable_gqa=True), call(r(b, q, d), r(b, s, d), r(b, s, d)), call(r(12, d), r(s, d), r(s, d)),
        call(*base(), None, 0.5), call(*gqa(4), None, 0.5, enable_gqa=True),
        call(*gqa(1), None, 0.5, enable_gqa=True), call(*base(), None, 0.25, True), call(*base(), r(b, 1, q, s), 0.25),
        call(r(b, h, q, d), r(b, h, s, d), r(b, h, s, d), attn_mask=r(q, s)), call(value=r(b, h, s, d), key=r(b, h, s, d), query=r(b, h, q, d)),
    ]  # fmt: skip


@samples("max_pool1d.default", "avg_pool1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8), [2]), call(r(12, 8), [2]), call(r(4, 12, 9), [2], [2], [0], ceil_mode=True)]


@samples("max_pool2d.default", "avg_pool2d.default", "max_pool2d_with_indices.default")
def _() -> list[Any]:
    return [
        call(r(4, 12, 8, 8), [2, 2]),
        call(r(12, 8, 8), [2, 2]),
        call(r(4, 12, 9, 8), [3, 2], [2, 2], [1, 1], ceil_mode=True),
    ]


@samples("max_pool3d.default", "avg_pool3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), [2, 2, 2]), call(r(12, 4, 4, 4), [2, 2, 2])]


@samples("adaptive_avg_pool1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8), [3]), call(r(12, 8), [1])]


@samples("adaptive_avg_pool2d.default", "adaptive_max_pool2d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8, 8), [3, 3]), call(r(12, 8, 8), [1, 1])]


@samples("adaptive_avg_pool3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), [2, 1, 2])]


@samples("upsample_nearest1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 5), [10])]


@samples("upsample_linear1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 5), [10], False)]


@samples("upsample_nearest2d.default", "_upsample_nearest_exact2d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 5, 5), [10, 9])]


@samples("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
def _() -> list[Any]:
    return []


_makers["upsample_nearest1d.vec"] = lambda: [call(r(4, 12, 5), None, [2.0])]
_makers["upsample_nearest2d.vec"] = lambda: [call(r(4, 12, 5, 5), None, [2.0, 2.0]), call(r(4, 12, 5, 5), [7, 7], None)]
_makers["upsample_nearest3d.vec"] = lambda: [call(r(4, 12, 3, 3, 3), None, [2.0, 2.0, 2.0])]


@samples(
    "upsample_bilinear2d.default",
    "upsample_bicubic2d.default",
    "_upsample_bilinear2d_aa.default",
    "_upsample_bicubic2d_aa.default",
)
def _() -> list[Any]:
    return [call(r(4, 12, 5, 5), [10, 9], False), call(r(4, 12, 5, 5), [10, 9], True)]


@samples("upsample_bilinear2d.vec", "upsample_bicubic2d.vec")
def _() -> list[Any]:
    return [call(r(4, 12, 5, 5), None, False, [2.0, 2.0]), call(r(4, 12, 5, 5), [7, 7], True, None)]


@samples("upsample_nearest3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 3, 3, 3), [6, 6, 6])]


@samples("upsample_trilinear3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 3, 3, 3), [6, 6, 6], False)]


@samples("reflection_pad2d.default", "replication_pad2d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 5, 5), [1, 2, 1, 0]), call(r(12, 5, 5), [1, 1, 1, 1])]


@samples("pixel_shuffle.default")
def _() -> list[Any]:
    return [call(r(4, 48, 3, 3), 2), call(r(48, 3, 3), 2), call(r(2, 4, 48, 3, 3), 2)]


@samples("pixel_unshuffle.default")
def _() -> list[Any]:
    return [call(r(4, 12, 6, 6), 2), call(r(12, 6, 6), 3)]


@samples("channel_shuffle.default")
def _() -> list[Any]:
    return [call(r(4, 12, 6, 6), 3), call(r(4, 12, 6), 2)]


@samples("im2col.default")
def _() -> list[Any]:
    return [call(r(4, 12, 6, 6), [2, 2], [1, 1], [0, 0], [2, 2]), call(r(12, 6, 6), [3, 3], [1, 1], [1, 1], [1, 1])]


@samples("col2im.default")
def _() -> list[Any]:
    return [
        call(r(4, 48, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2]),
        call(r(48, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2]),
    ]


@samples("grid_sampler.default", "grid_sampler_2d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 5, 5), pos(4, 6, 12, 2), 0, 0, False)]


_makers["grid_sampler.default"] = lambda: [
    call(r(4, 12, 5, 5), pos(4, 6, 12, 2), 0, 0, False),
    call(r(4, 12, 3, 3, 3), pos(4, 2, 2, 2, 3), 0, 0, False),
]


@samples("pad.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), [1, 2]), call(r(12, 24), [0, 0, 1, 1]), call(r(12, 24), [1, 1], "constant", 2.0), call(r(12, 24), [-1, 0]), call(r(4, 12, 8), [2, 1], "reflect"),
        call(r(4, 12, 8), [2, 1], "circular"), call(r(4, 12, 6, 6), [1, 1, 0, 0], "replicate"), call(r(12, 24), [1, 1], value=0.0), call(r(12), [0, 0], "constant", 3.0),
    ]  # fmt: skip


@samples("constant_pad_nd.default")
def _() -> list[Any]:
    return [call(r(12, 24), [1, 2]), call(r(12, 24), [0, 0, 1, 1], 2.0), call(r(4, 12, 6), [0, 0, 1, 0])]


@samples("tril.default", "triu.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(4, 12, 6), 1), call(r(2, 4, 6, 6), -1)]


@samples("view.default", "reshape.default", "_unsafe_view.default")
def _() -> list[Any]:
    shapes: list[tuple[tuple[int, ...], list[int]]] = [
        ((12, 24), [12, 4, 6]), ((12, 24), [288]), ((4, 12, 24), [48, 24]), ((48, 24), [4, 12, 24]), ((12, 24), [-1]), ((12, 24), [24, 12]), ((6, 4), [8, 3]),
        ((4, 72), [4, 3, 24]), ((4, 3, 24), [4, 72]), ((4, 6, 12), [4, 3, 2, 12]), ((12, 1, 24), [12, 24]), ((12, 24), [1, 12, 24, 1]), ((1,), []), ((), [1, 1]),
        ((2, 12, 4, 6), [2, 12, 24]), ((2, 12, 24), [2, 12, -1, 6]), ((4, 2, 12), [8, 12]), ((3, 4, 12), [12, 12]), ((12, 12), [3, 48]), ((0, 12), [12, 0]), ((2, 3, 4), [4, 6]), ((12, 24), [12, 24]),
        ((2, 2, 2, 36), [4, 72]), ((36, 48), [6, 6, 4, 12]), ((24, 5), [4, 30]),
    ]  # fmt: skip
    return [call(r(*a), b) for a, b in shapes] + [call(ints(9, 12, 24), [12, 2, 12])]


@samples("view.dtype")
def _() -> list[Any]:
    return [call(r(12, 24), torch.int64), call(r(12, 24), torch.int32)]


@samples("flatten.using_ints")
def _() -> list[Any]:
    return [
        call(r(4, 12, 6)),
        call(r(4, 12, 6), 1),
        call(r(4, 12, 6), 0, 1),
        call(r(4, 12, 6), -2),
        call(r(12)),
        call(r(12, 4), 1, 1),
        call(r()),
    ]


@samples("ravel.default")
def _() -> list[Any]:
    return [call(r(4, 12, 6)), call(r(12))]


@samples("unflatten.int")
def _() -> list[Any]:
    return [
        call(r(12, 24), 1, [4, 6]),
        call(r(12, 24), 0, [3, 4]),
        call(r(12, 24), -1, [-1, 12]),
        call(r(24), 0, [2, 3, 4]),
    ]


@samples("unsqueeze.default")
def _() -> list[Any]:
    return [call(r(12, 24), 0), call(r(12, 24), 1), call(r(12, 24), -1), call(r(), 0)]


@samples("squeeze.default")
def _() -> list[Any]:
    return [call(r(12, 1, 24)), call(r(2, 1, 3)), call(r(1)), call(r(12, 2))]


@samples("squeeze.dim")
def _() -> list[Any]:
    return [call(r(12, 1, 24), 1), call(r(2, 1, 12), 0), call(r(12, 2), -1), call(r(1, 12), 0)]


@samples("squeeze.dims")
def _() -> list[Any]:
    return [call(r(12, 1, 24), [1]), call(r(1, 2, 12), [0, 1]), call(r(1, 3, 4, 1), [0, 1, 2, 3])]


@samples("transpose.int", "swapaxes.default", "swapdims.default", "transpose_copy.int")
def _() -> list[Any]:
    return [
        call(r(12, 24), 0, 1),
        call(r(4, 12, 6), -1, 1),
        call(r(4, 12, 6), 0, 0),
        call(r(), 0, 0),
        call(r(2, 4, 12, 6), 1, 2),
    ]


@samples("t.default", "numpy_T.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(12))]


@samples("mT.default", "mH.default", "adjoint.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(4, 12, 6))]


@samples("permute.default", "permute_copy.default")
def _() -> list[Any]:
    return [call(r(4, 12, 6), [2, 0, 1]), call(r(4, 12, 6), [-1, 0, -2]), call(r(12, 24), [1, 0]), call(r(), [])]


@samples("movedim.int", "moveaxis.int")
def _() -> list[Any]:
    return [call(r(4, 12, 6), 0, 2), call(r(4, 12, 6), -1, 0)]


@samples("movedim.intlist", "moveaxis.intlist")
def _() -> list[Any]:
    return [call(r(4, 12, 6), [0, 1], [2, 0]), call(r(4, 12, 6), [-1, 0], [0, 1])]


@samples("expand.default", "broadcast_to.default")
def _() -> list[Any]:
    return [
        call(r(12, 1), [12, 24]),
        call(r(24), [12, 24]),
        call(r(1, 24), [6, 24]),
        call(r(12, 1, 6), [2, 12, 4, 6]),
        call(r(), [12]),
        call(r(12, 24), [12, 24]),
    ]


_EXPAND = _makers["expand.default"]
_makers["expand.default"] = lambda: [*_EXPAND(), call(r(12, 1), [-1, 24]), call(r(12, 24), [4, -1, -1])]


@samples("repeat.default", "tile.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), [2, 1]),
        call(r(12, 24), [1, 3]),
        call(r(12), [4, 2]),
        call(r(12, 24), [1, 1]),
        call(r(12, 1), [1, 6]),
        call(r(4, 12), [3, 1, 2]),
    ]


_TILE = _makers["tile.default"]
_makers["tile.default"] = lambda: [*_TILE(), call(r(4, 12), [2])]


@samples("repeat_interleave.self_int")
def _() -> list[Any]:
    return [
        call(r(12, 24), 2, 0),
        call(r(12, 24), 3, -1),
        call(r(12, 24), 2),
        call(r(12), 4),
        call(r(12, 24), 2, 0, output_size=24),
        call(r(12, 24), 1, 1),
        call(r(2, 4, 12, 6), 3, 1),
    ]


@samples("select.int", "select_copy.int")
def _() -> list[Any]:
    return [call(r(12, 24), 0, 3), call(r(12, 24), -1, -2), call(r(4, 12, 6), 1, 0), call(r(12), 0, 5)]


@samples("unbind.int")
def _() -> list[Any]:
    return [call(r(3, 12, 24)), call(r(12, 3), -1), call(r(12, 2, 6), 1), call(r(4), 0)]


@samples("meshgrid.default")
def _() -> list[Any]:
    return [call([r(12), r(24)]), call([r(12), r(), r(24)]), call([r(12)])]


@samples("meshgrid.indexing")
def _() -> list[Any]:
    return [call([r(12), r(24)], indexing=i) for i in ("ij", "xy")] + [call([r(12), r(4), r(24)], indexing="xy")]


@samples("diagonal.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(12, 6, 6), 0, 1, 2), call(r(6, 12, 4), 1, 0, -1), call(r(4, 6, 12, 6), 0, -1, 1)]


@samples("split.Tensor")
def _() -> list[Any]:
    return [
        call(r(12, 24), 12, 1),
        call(r(12, 24), 5, -1),
        call(r(36, 12), 12),
        call(r(12, 24), 24, 1),
        call(r(12, 24), 30, 1),
        call(r(12, 48), 24, -1),
        call(r(2, 72), 24, 1),
    ]


@samples("split_with_sizes.default", "split.sizes")
def _() -> list[Any]:
    return [
        call(r(12, 48), [24, 12, 12], -1),
        call(r(36, 4), [12, 24]),
        call(r(12, 24), [24], 1),
        call(r(12, 72), [24, 24, 24], 1),
        call(r(12, 24), [5, 19], 1),
        call(r(12, 24), [0, 24], 1),
    ]


@samples("chunk.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), 2, -1),
        call(r(36, 4), 3),
        call(r(12, 24), 5, 1),
        call(r(12, 24), 1, 1),
        call(r(12, 72), 3, 1),
        call(r(48, 24), 2),
    ]


@samples("tensor_split.sections")
def _() -> list[Any]:
    return [call(r(12, 24), 2, -1), call(r(36, 4), 3), call(r(12, 24), 5, 1)]


@samples("tensor_split.indices")
def _() -> list[Any]:
    return [call(r(12, 24), [12], 1), call(r(36, 4), [12, 24]), call(r(12, 24), [5], 1), call(r(72, 2), [24, 48])]


@samples("tensor_split.tensor_indices_or_sections")
def _() -> list[Any]:
    return [call(r(12, 24), torch.tensor(2), 1)]


@samples("slice.Tensor")
def _() -> list[Any]:
    big = 2**63 - 1
    return [
        call(r(12, 24), 1, 0, 12), call(r(12, 24), 1, 12, big), call(r(12, 24), -1, -12), call(r(12, 24), 0, 0, big), call(r(12, 24), 0, 0, big, 2), call(r(36, 4), 0, 12, 24), call(r(36, 4), 0, 12, -12),
        call(r(12, 24)), call(r(12, 24), 1, None, -1), call(r(12, 24), 1, 3, 3), call(r(12, 24), 1, -100, 12), call(dim=1, self=r(12, 24), start=12), call(r(72, 2), 0, 24, 72),
    ]  # fmt: skip


@samples("narrow.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), 1, 0, 12),
        call(r(12, 24), -1, 12, 12),
        call(r(12, 24), 0, 0, 12),
        call(r(36, 4), 0, -12, 12),
        call(r(72, 2), 0, 24, 24),
    ]


@samples("narrow.Tensor")
def _() -> list[Any]:
    return [call(r(12, 24), 1, torch.tensor(3), 12)]


@samples("cat.default", "concat.default", "concatenate.default")
def _() -> list[Any]:
    return [
        call([r(12, 24), r(12, 24)], 1), call([r(12, 24), r(24, 24)]), call([r(12, 24), r(12, 12)], -1), call([r(12)]), call([r(12, 24), r(12, 24), r(12, 24)], 0), call([r(4, 12, 6), r(4, 1, 6)], 1),
        call([r(0), r(12)]), call([r(12, 24), ints(9, 12, 24)]), call([r(12, 24), r(12, 48)], 1), call([r(12, 0), r(12, 24)], 1), call([r(2, 36), r(2, 72)], 1),
    ]  # fmt: skip


_CAT = _makers["cat.default"]
_makers["cat.default"] = lambda: [*_CAT(), call([torch.zeros(0, dtype=D), r(12, 24)])]


@samples("stack.default")
def _() -> list[Any]:
    return [
        call([r(12, 24), r(12, 24)]),
        call([r(12, 24), r(12, 24)], -1),
        call([r(12), r(12), r(12)], 1),
        call([r(), r()]),
    ]


@samples("view_as_complex.default")
def _() -> list[Any]:
    return [call(r(12, 24, 2)), call(r(12, 2))]


@samples("view_as_real.default")
def _() -> list[Any]:
    return [call(cplx(12, 24)), call(cplx(12))]


@samples("index.Tensor", "_unsafe_index.Tensor")
def _() -> list[Any]:
    x = lambda: r(4, 12, 6, 12)  # noqa: E731
    return [
        call(x(), [ints(4, 12)]), call(x(), [None, ints(12, 24)]), call(x(), [ints(4, 12, 1), ints(12, 24)]), call(x(), [None, ints(12, 6), ints(6, 6)]), call(x(), [ints(4, 12), None, ints(6, 12)]),
        call(x(), [None, ints(12, 12), None, ints(5, 12)]), call(x(), [bools(4)]), call(x(), [None, bools(12)]), call(x(), [torch.ones(4, dtype=torch.bool)]), call(x(), [bools(4, 12)]),
        call(x(), [ints(4)]), call(x(), [None, None, ints(6, 4, 12)]), call(r(24), [ints(24, 12)]), call(x(), [ints(4, 12), ints(12, 12), ints(6, 12), ints(5, 12)]), call(x(), [bools(4), ints(12, 1)]),
        call(x(), [None, torch.tensor([1, 0, 1] * 4, dtype=torch.bool)]),
    ]  # fmt: skip


_INDEX = _makers["index.Tensor"]
_makers["_unsafe_index.Tensor"] = lambda: _INDEX()[:5]


@samples("index_put.default", "_unsafe_index_put.default")
def _() -> list[Any]:
    x = lambda: r(4, 12, 6)  # noqa: E731
    return [
        call(x(), [torch.tensor([0, 2])], r(2, 12, 6)), call(x(), [torch.tensor([0, 2])], r(12, 6)), call(x(), [torch.tensor([0, 2])], r(2, 1, 6)), call(x(), [None, torch.tensor([3, 1, 5])], r(4, 3, 6)),
        call(x(), [ints(4, 12)], r(12, 12, 6), True), call(x(), [ints(4, 12), ints(12, 12)], r(12, 6), True), call(x(), [ints(4, 12), None, ints(6, 12)], r(12, 12), True), call(x(), [torch.tensor(2)], r(12, 6)),
        call(x(), [bools(4)], torch.tensor(1.5, dtype=D)), call(x(), [bools(4, 12)], torch.tensor(0.5, dtype=D)), call(x(), [torch.tensor([True, False, True, False])], r(2, 12, 6)), call(x(), [torch.tensor([1, 0])], r(), True),
    ]  # fmt: skip


_PUT = _makers["index_put.default"]
_makers["_unsafe_index_put.default"] = lambda: _PUT()[:5]


@samples("index_select.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), 0, ints(12, 12)),
        call(r(12, 24), -1, ints(24, 6)),
        call(r(12, 24), 1, ints(24, 24)),
        call(r(12), 0, torch.tensor(3)),
        call(r(12, 24), 0, ints(12, 1)),
    ]


@samples("index_add.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), 0, ints(12, 6), r(6, 24)),
        call(r(12, 24), -1, ints(24, 12), r(12, 12)),
        call(r(12, 24), 0, ints(12, 12), r(12, 24), alpha=2),
        call(r(12), 0, ints(12, 4), r(4)),
    ]


@samples("index_copy.default")
def _() -> list[Any]:
    return [call(r(12, 24), 0, torch.tensor([3, 1]), r(2, 24)), call(r(12, 24), 1, torch.randperm(24), r(12, 24))]


@samples("index_fill.int_Scalar")
def _() -> list[Any]:
    return [call(r(12, 24), 0, torch.tensor([3, 1]), 2.0), call(r(12, 24), -1, ints(24, 12), 2.0)]


@samples("index_fill.int_Tensor")
def _() -> list[Any]:
    return [call(r(12, 24), 0, torch.tensor([3, 1]), r())]


@samples("gather.default", "take_along_dim.default")
def _() -> list[Any]:
    return []


_makers["gather.default"] = lambda: [
    call(r(12, 24), 1, ints(24, 12, 6)),
    call(r(12, 24), 0, ints(12, 6, 24)),
    call(r(12, 24), -1, ints(24, 12, 24)),
    call(r(12, 24), 1, ints(24, 6, 4)),
    call(r(12), 0, ints(12, 24)),
    call(r(12, 24), 0, ints(12, 12, 1)),
    call(r(4, 12, 6), 2, ints(6, 4, 12, 1)),
    call(r(), 0, ints(1)),
]
_makers["take_along_dim.default"] = lambda: [
    call(r(12, 24), ints(24, 12, 6), 1),
    call(r(12, 24), ints(24, 1, 6), 1),
    call(r(12, 24), ints(12 * 24, 12)),
    call(r(1, 24), ints(24, 12, 6), 1),
]


def _permuted(dim: int, *shape: int) -> torch.Tensor:
    """Positions along ``dim`` that do not repeat."""
    return torch.rand(shape).argsort(dim)


@samples("scatter.src")
def _() -> list[Any]:
    return [
        call(r(12, 24), 1, _permuted(1, 12, 24), r(12, 24)),
        call(r(12, 24), 0, _permuted(0, 12, 24), r(12, 24)),
        call(r(12, 24), 1, _permuted(1, 12, 6), r(12, 6)),
        call(r(12, 24), -1, _permuted(1, 6, 6), r(12, 12), constants=(2,)),
        call(r(12), 0, _permuted(0, 12), r(12)),
    ]


@samples("scatter.value")
def _() -> list[Any]:
    return [
        call(r(12, 24), 1, ints(24, 12, 6), 2.0),
        call(r(12, 24), 0, ints(12, 4, 24), 2.0),
        call(r(12, 24), 1, ints(24, 6, 6), 1),
    ]


@samples("scatter.reduce", "scatter.value_reduce")
def _() -> list[Any]:
    return []


_makers["scatter.reduce"] = lambda: [
    call(r(12, 24), 1, ints(24, 12, 24), r(12, 24), reduce="add", gradients=False),
    call(r(12, 24), 1, ints(24, 12, 6), r(12, 6), reduce="multiply", gradients=False),
]
_makers["scatter.value_reduce"] = lambda: [call(r(12, 24), 1, ints(24, 12, 24), 2.0, reduce="add", gradients=False)]


@samples("scatter_add.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), 1, ints(24, 12, 24), r(12, 24)),
        call(r(12, 24), 0, ints(12, 6, 24), r(6, 24)),
        call(r(12, 24), 0, ints(12, 12, 6), r(12, 12), constants=(2,)),
        call(r(12), 0, ints(12, 24), r(24)),
    ]


@samples("scatter_reduce.two")
def _() -> list[Any]:
    return [call(r(12, 24), 1, ints(24, 12, 24), r(12, 24), reduce) for reduce in ("sum", "amax", "mean")] + [
        call(r(12, 24), 0, ints(12, 6, 24), r(6, 24), "sum", include_self=False)
    ]


@samples("slice_scatter.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(12, 12), 1, 0, 12),
        call(r(12, 24), r(4, 24), 0, 4, 8),
        call(r(12, 24), r(12, 24)),
        call(r(12, 24), r(12, 12), -1, 0, 24, 2),
        call(r(12, 24), r(12, 24), 1, 0, 2**63 - 1),
    ]


@samples("select_scatter.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(24), 0, 3), call(r(12, 24), r(12), -1, 2), call(r(4, 12, 6), r(4, 6), 1, 0)]


@samples("searchsorted.Tensor")
def _() -> list[Any]:
    rows = lambda *s: r(*s).sort(-1).values  # noqa: E731
    return [
        call(rows(12), r(12)),
        call(rows(12), r(4, 12)),
        call(rows(12, 6), r(12, 4)),
        call(rows(4, 12, 6), r(4, 12, 6), right=True),
        call(rows(12), r()),
        call(r(12, 6), r(12, 4), sorter=r(12, 6).argsort(-1)),
    ]


@samples("searchsorted.Scalar")
def _() -> list[Any]:
    return [call(r(12).sort().values, 0.5)]


@samples("bucketize.Tensor")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(6).sort().values),
        call(r(12), r(12).sort().values),
        call(boundaries=r(4).sort().values, self=r(12)),
    ]


@samples("bucketize.Scalar")
def _() -> list[Any]:
    return [call(0.5, r(12).sort().values)]


@samples("one_hot.default")
def _() -> list[Any]:
    return [call(ints(12, 12, 4), 12), call(ints(12, 12)), call(ints(12), 12)]
