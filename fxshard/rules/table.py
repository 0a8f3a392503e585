"""The rules, one line an operator, and the lookup.

A row is: operators | notation or rule function | the operands through which it is linear. The third column lists
sets of operands: ``0`` alone, ``0;1`` either, ``0,1`` both at once, ``all`` every tensor operand at once. Where exactly
the operands of one set are Partial, the result is Partial too, and nothing is reduced yet.

An operator without a row is right all the same: its operands are gathered and the report says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from fxshard.errors import RuleError
from fxshard.rules import operators as op
from fxshard.rules import views
from fxshard.rules.notation import apply, parse
from fxshard.rules.recipe import Call, Recipe, RuleFunction, signature_of

POINTWISE = """
    abs acos acosh add angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu
    clamp clamp_max clamp_min clone contiguous copy cos cosh deg2rad detach digamma div dropout elu eq erf erfc erfinv
    exp exp2 expm1 fill floor floor_divide fmax fmin fmod frac ge gelu gt hardshrink hardsigmoid hardswish hardtanh
    hypot isfinite isinf isnan isneginf isposinf le leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid logaddexp
    logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply nan_to_num
    ne neg positive pow prelu rad2deg real imag reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign
    signbit silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract tan tanh threshold to to_copy
    true_divide trunc type_as where xlogy zero zeros_like ones_like full_like empty_like addcmul addcdiv float bool half
    bfloat16 double int long __and__ __or__ __xor__ view_as_complex_copy alias alias_copy lift_fresh_copy lift_fresh
    special_erf special_expit log1p conj resolve_conj resolve_neg ldexp heaviside divide greater less not_equal
    min.other max.other _to_copy div.Tensor_mode div.Scalar_mode divide.Tensor_mode divide.Scalar_mode
"""

LINEAR = {
    "add": "all", "sub": "all", "mul": "0;1", "multiply": "0;1", "div": "0", "true_divide": "0", "neg": "0",
    "clone": "0", "contiguous": "0", "alias": "0", "where.self": "1,2", "rsub": "all", "subtract": "all", "divide": "0",
    "positive": "0",
}  # fmt: skip

TABLE = """
    linear                          | ... i+, o i+ -> ... o                     | 0;1
    mm                              | m k+, k+ n -> m n                         | 0;1
    bmm                             | b m k+, b k+ n -> b m n                   | 0;1
    mv                              | m k+, k+ -> m                             | 0;1
    dot vdot                        | k+, k+ ->                                 | 0;1
    addmm                           | @addmm                                    |
    baddbmm                         | b m n, b m k!, b k! n -> b m n            |
    matmul                          | @matmul                                   | 0;1
    einsum                          | @einsum                                   | 0;1
    outer                           | m, n -> m n                               | 0;1
    embedding                       | @embedding                                | 0
    scaled_dot_product_attention    | @attention                                | 2
    softmax log_softmax cumsum cumprod logcumsumexp sort argsort topk flip roll cummax cummin glu diff kthvalue
    median mode renorm unfold msort                                | @dim_whole |
    sum                             | @sums                                     | 0
    mean                            | @means                                    | 0
    amax amin prod any all var std norm linalg_vector_norm logsumexp argmax argmin max min var_mean std_mean
    nansum count_nonzero histc bincount                            | @reduces   |
    layer_norm rms_norm             | @trailing_norm                            |
    group_norm                      | @batch_only                               |
    batch_norm                      | @batch_norm                               |
    conv1d conv2d conv3d            | @conv                                     |
    conv_transpose1d conv_transpose2d conv_transpose3d             | @batch_only |
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest1d
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d
    upsample_nearest3d pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im grid_sampler affine_grid_generator
                                    | @batch_only                               |
    pad constant_pad_nd             | @pad                                      |
    tril triu                       | @matrix_whole                             | 0
    view reshape flatten unflatten unsqueeze squeeze _unsafe_view reshape_as view_as ravel
                                    | @view                                     | 0
    transpose swapaxes swapdims     | @transpose                                | 0
    t numpy_T mT                    | @reverse                                  | 0
    permute                         | @permute                                  | 0
    movedim moveaxis                | @movedim                                  | 0
    expand broadcast_to expand_as   | @expand                                   | 0
    repeat tile                     | @repeat                                   | 0
    repeat_interleave.self_int      | @repeat_interleave                        | 0
    select                          | @select                                   | 0
    unbind                          | @unbind                                   | 0
    split split_with_sizes chunk slice narrow tensor_split | @cut               | 0
    cat concat concatenate          | @cat                                      | all
    stack                           | @stack                                    | all
    index                           | @index                                    | 0
    index_select                    | @index_select                             | 0
    gather take_along_dim           | @gather                                   | 0
    view.dtype                      | @whole                                    |
    new_ones new_zeros new_full new_empty empty_like_shape new_empty_strided | @shape_only |
    cross_entropy_loss nll_loss nll_loss_nd                        | @cross_entropy |
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
                                    | @elementwise_loss                         |
    one_hot                         | ... -> ... v!                             |
    bucketize searchsorted          | @first_only                               |
    view_as_complex                 | ... c! -> ...                             |
    view_as_real                    | ... -> ... c!                             |
    polar complex                   | @pointwise                                |
"""


@dataclass(frozen=True)
class Rule:
    """One row: the name, how the recipe is made, and the text that made it."""

    name: str
    function: Callable[[Call], Recipe]
    text: str


_rules: dict[str, Rule] = {}


def _linear_sets(text: str, call: Call) -> tuple[frozenset[int], ...]:
    if not text:
        return ()
    if text == "all":
        return () if call.affine else (frozenset(range(len(call.inputs))),)
    sets = (frozenset(map(int, part.split(","))) for part in text.split(";"))
    return tuple(s for s in sets if max(s) < len(call.inputs) and not (len(s) > 1 and call.affine))


def make_rule(name: str, text: str, linear: str = "") -> Rule:
    """A rule from a row of the table; ``@f`` names a function of ``views`` or ``operators``."""
    if text.startswith("@"):
        function: RuleFunction = getattr(op, text[1:], None) or getattr(views, text[1:])
    else:
        notation = parse(text)

        def function(call: Call) -> Recipe:
            return apply(notation, call)

    def recipe(call: Call) -> Recipe:
        made = function(call)
        return Recipe(made.factors, made.linear or _linear_sets(linear, call), made.unread)

    return Rule(name, recipe, text if not linear else f"{text} | {linear}")


def _load() -> None:
    for name in POINTWISE.split():
        _rules[f"aten.{name}"] = make_rule(f"aten.{name}", "@pointwise", LINEAR.get(name, ""))
    for name, linear in LINEAR.items():
        _rules.setdefault(f"aten.{name}", make_rule(f"aten.{name}", "@pointwise", linear))
    names: list[str] = []
    for line in TABLE.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        names += cells[0].split()
        if len(cells) > 1:
            for name in names:
                _rules[f"aten.{name}"] = make_rule(f"aten.{name}", cells[1], cells[2])
            names = []


@lru_cache(maxsize=None)
def name_of(target: object) -> tuple[str, str]:
    """The two names under which a rule is looked up: with the overload, and without."""
    if isinstance(target, torch._ops.OpOverload):
        packet = f"{target.namespace}.{target._schema.name.split('::')[1]}"
        return f"{packet}.{target._overloadname}", packet
    return str(target), str(target)


def find_rule(target: object) -> Rule | None:
    """The rule of an operator; None where there is none, and its operands must be gathered."""
    if not _rules:
        _load()
    full, packet = name_of(target)
    return _rules.get(full) or _rules.get(packet)


def register_rule(operator: object, rule: str | RuleFunction, *, linear: str = "") -> None:
    """Teaches fxshard how an operator may be split.

    Args:
        operator: a ``torch.ops`` overload or packet, or its name, e.g. ``"mylib::scale"`` or ``"aten.softplus"``.
        rule: the notation (see ``fxshard.rules.notation``), ``"@pointwise"``, or a function of a ``Call``.
        linear: through which operands a partial sum may pass: ``"0"``, ``"0;1"`` (either), ``"0,1"`` (both at
            once), ``"all"``.

    Raises:
        RuleError: when the notation cannot be read.

    >>> register_rule("mylib::scale", "... d, d -> ... d", linear="0")

    Reference: GSPMD (Xu et al., 2021), section 3.
    """
    if not _rules:
        _load()
    if isinstance(operator, torch._ops.OpOverload):
        name = name_of(operator)[0]
    elif isinstance(operator, torch._ops.OpOverloadPacket):
        name = operator._qualified_op_name.replace("::", ".")
    elif isinstance(operator, str):
        name = operator.replace("::", ".")
    else:
        raise RuleError(f"cannot register a rule for {operator!r}", fix="give torch.ops.lib.op, or 'lib::op'")
    if isinstance(rule, str):
        made = make_rule(name, rule, linear)
    else:
        function = rule

        def recipe(call: Call) -> Recipe:
            out = function(call)
            return Recipe(out.factors, out.linear or _linear_sets(linear, call), out.unread)

        made = Rule(name, recipe, getattr(rule, "__name__", "function"))
    _rules[name] = made
    generation.append(name)


@contextlib.contextmanager
def temporary_rule(operator: object, rule: str | RuleFunction, *, linear: str = "") -> Iterator[None]:
    """As ``register_rule``, until the context ends."""
    before = all_rules()
    register_rule(operator, rule, linear=linear)
    try:
        yield
    finally:
        _rules.clear()
        _rules.update(before)
        generation.append("")


generation: list[str] = []
"""The names registered so far: caches of recipes are keyed by its length."""


def all_rules() -> dict[str, Rule]:
    """Every rule by its name."""
    if not _rules:
        _load()
    return dict(_rules)
