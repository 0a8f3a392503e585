"""The rules, one line an operator, and the lookup.

A row is: operators | notation or rule function | the operands through which it is linear. The third column lists
sets of operands: ``0`` alone, ``0;1`` either, ``0,1`` both at once, ``all`` every tensor operand at once. Where exactly
the operands of one set are Partial, the result is Partial too, and nothing is reduced yet.

An operator of another library is written with its namespace, ``lib::op``. An operator without a row is right all the
same: its operands are gathered and the report says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from fxshard.errors import RuleError
from fxshard.rules import contractions, indexing, norms, pointwise, reductions, views
from fxshard.rules.notation import apply, fits, parse
from fxshard.rules.recipe import Call, Recipe, RuleFunction
from fxshard.torch_internals import OpOverload, OpOverloadPacket

POINTWISE = """
    abs acos acosh angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor
    bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ ceil celu clamp clamp_max
    clamp_min clip complex copysign cos cosh deg2rad digamma elu empty_like eq erf erfc erfinv exp exp2 expm1 floor
    floor_divide fmax fmin fmod frac full_like ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish
    hardtanh heaviside hypot i0 isclose isfinite isinf isnan isneginf isposinf ldexp le leaky_relu less less_equal
    lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    logit lt max.other maximum min.other minimum mish mvlgamma nan_to_num ne nextafter not_equal ones_like polar
    polygamma pow rad2deg reciprocal relu relu6 remainder round rsqrt selu sgn sigmoid sign signbit silu sin sinc
    sinh softplus softshrink special_erf special_erfcx special_entr special_expit special_i0e special_i1
    special_log1p special_log_ndtr special_ndtr special_xlog1py special_xlogy special_zeta sqrt square tan tanh
    threshold trunc xlogy div.Tensor_mode div.Scalar_mode divide.Tensor_mode divide.Scalar_mode rand_like randn_like
    bernoulli addcmul addcdiv absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh conj_physical fix
    float_power frexp.Tensor gcd igamma igammac isreal lcm special_bessel_j0 special_bessel_j1 special_bessel_y0
    special_bessel_y1 special_digamma special_erfinv special_exp2 special_expm1 special_gammainc special_gammaincc
    special_gammaln special_i1e special_logit special_ndtri special_psi special_round special_sinc
"""
"""Operators that treat every element alike: every dim may be split, operands broadcast."""

TABLE = """
    add sub subtract rsub           | @pointwise                                | all
    mul multiply                    | @pointwise                                | 0;1
    div divide true_divide          | @pointwise                                | 0
    neg negative positive clone contiguous alias alias_copy detach lift_fresh lift_fresh_copy zeros_like
    real imag conj _conj resolve_conj resolve_neg      | @pointwise | 0
    lerp                            | @pointwise                                | 0,1
    where                           | @where                                    |
    where.self                      | @where                                    | 1,2
    copy                            | @pointwise                                | 1;0,1
    fill zero                       | @pointwise                                |
    masked_fill                     | @masked_fill                              |
    to _to_copy                     | @cast                                     |
    dropout                         | @dropout                                  |
    prelu                           | @prelu                                    |
    fxshard::hidden_write           | @pointwise                                |
    fxshard::taken                  | @pointwise                                | 1,2
    new_ones new_zeros new_full new_empty new_empty_strided        | @shape_only |
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    soft_margin_loss                | @elementwise_loss                         |
    cosine_similarity linalg_cross cross | @cosine_similarity                   |
    softmax log_softmax             | @softmax                                  |
    _softmax _log_softmax _safe_softmax cumprod logcumsumexp sort argsort topk cummax cummin           | @dim_whole |
    glu                             | @glu                                      |
    cumsum                          | @cumsum                                   |
    flip roll diff                  | @scan                                     |
    renorm                          | @renorm                                   |
    unfold                          | @unfold                                   |
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
    fft_rfftn fft_irfftn fft_fftshift fft_ifftshift                | @fft       |
    sum                             | @sums                                     |
    nansum count_nonzero            | @counts                                   |
    mean                            | @means                                    |
    amax amin aminmax max min logsumexp                            | @extremes |
    argmax argmin max.dim min.dim                                  | @positions |
    var std var_mean std_mean                                      | @moments |
    norm linalg_vector_norm                                        | @vector_norms |
    prod any all                                                   | @shares |
    median nanmedian kthvalue mode                                 | @reduces   |
    histc                           | @histc                                    |
    nanmean linalg_norm linalg_matrix_norm                         | @reduces   |
    msort flipud                    | n! ... -> n! ...                          |
    fliplr                          | m n! ... -> m n! ...                      | 0
    rot90                           | @dim_whole                                |
    layer_norm rms_norm native_layer_norm                          | @trailing_norm |
    group_norm                      | @group_norm                               |
    batch_norm                      | @batch_norm                               |
    instance_norm                   | @instance_norm                            |
    _weight_norm                    | @weight_norm                              |
    cross_entropy_loss nll_loss nll_loss_nd                        | @cross_entropy |
    linear                          | @linear                                   |
    mm                              | m k+, k+ n -> m n                         | 0;1
    bmm                             | b m k+, b k+ n -> b m n                   | 0;1
    mv                              | m k+, k+ -> m                             | 0;1
    dot vdot                        | k+, k+ ->                                 | 0;1
    outer ger                       | m, n -> m n                               | 0;1
    inner                           | m k+, n k+ -> m n                         | 0;1
    kron                            | a b, c! d! -> (a c) (b d)                 | 0;1
    addmv                           | m, m k!, k! -> m                          |
    addr                            | m n, m, n -> m n                          |
    addbmm                          | m n, b! m k!, b! k! n -> m n              |
    tensordot                       | @tensordot                                |
    linalg_vecdot                   | @vecdot                                   | 0;1
    bilinear                        | @bilinear                                 |
    linalg_inv inverse linalg_pinv linalg_matrix_power matrix_power linalg_cholesky cholesky cholesky_inverse
                                    | ... m! n! -> ... p! q!                    |
    linalg_matrix_exp matrix_exp    | b m! n! -> b p! q!                        |
    linalg_inv_ex linalg_cholesky_ex                               | ... m! n! -> ... p! q!, ... |
    linalg_det det logdet           | ... m! n! -> ...                          |
    linalg_slogdet slogdet          | ... m! n! -> ..., ...                     |
    linalg_lu_factor geqrf          | ... m! n! -> ... p! q!, ... r!            |
    linalg_qr                       | ... m! n! -> ... p! q!, ... r! s!         |
    linalg_svd                      | ... m! n! -> ... p! q!, ... r!, ... s! t! |
    linalg_svdvals linalg_eigvalsh  | ... m! n! -> ... r!                       |
    linalg_eigh                     | ... m! n! -> ... r!, ... s! t!            |
    linalg_solve linalg_solve_ex linalg_solve_triangular           | @solve     |
    cholesky_solve                  | ... m! k, ... m! n! -> ... m! k           |
    cdist                           | ... m d!, ... n d! -> ... m n             |
    matmul linalg_matmul            | @matmul                                   |
    addmm baddbmm                   | @addmm                                    |
    einsum                          | @einsum                                   |
    _grouped_mm transformers::grouped_mm_fallback                  | @grouped_mm | 0;1
    embedding                       | @embedding                                |
    conv1d conv2d conv3d            | @conv                                     |
    conv_transpose1d conv_transpose2d conv_transpose3d             | @conv_transpose |
    convolution                     | @convolution                              |
    _scaled_dot_product_flash_attention_for_cpu                    | @flash_attention |
    _native_multi_head_attention _transformer_encoder_layer_fwd    | @fused_layer |
    lstm gru rnn_tanh rnn_relu      | @recurrent                                |
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell                 | @recurrent_cell |
    scaled_dot_product_attention    | @attention                                |
    max_pool1d                      | ... w! -> ... W!                          |
    avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d | ... w! -> ... W! | 0
    max_pool2d                      | ... h! w! -> ... H! W!                    |
    max_pool2d_with_indices adaptive_max_pool2d | ... h! w! -> ... H! W!, ... H! W! |
    avg_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad2d replication_pad2d
                                    | ... h! w! -> ... H! W!                    | 0
    max_pool3d                      | ... t! h! w! -> ... T! H! W!              |
    avg_pool3d adaptive_avg_pool3d upsample_nearest3d upsample_trilinear3d
                                    | ... t! h! w! -> ... T! H! W!              | 0
    max_pool1d_with_indices adaptive_max_pool1d                    | ... w! -> ... W!, ... W! |
    max_pool3d_with_indices adaptive_max_pool3d | ... t! h! w! -> ... T! H! W!, ... T! H! W! |
    fractional_max_pool2d           | b c h! w!, b c r! -> b c H! W!, b c H! W! |
    max_unpool2d                    | ... h! w!, ... h! w! -> ... H! W!         | 0
    max_unpool3d                    | ... t! h! w!, ... t! h! w! -> ... T! H! W! | 0
    reflection_pad1d replication_pad1d _upsample_nearest_exact1d   | ... w! -> ... W! | 0
    reflection_pad3d replication_pad3d _upsample_nearest_exact3d _adaptive_avg_pool3d
                                    | ... t! h! w! -> ... T! H! W!              | 0
    _adaptive_avg_pool2d            | ... h! w! -> ... H! W!                    | 0
    grid_sampler_3d                 | b c t! h! w!, b x y z three! -> b c x y z | 0
    stft                            | @stft                                     | 0
    pixel_shuffle                   | ... (c r) h! w! -> ... c H! W!            | 0
    pixel_unshuffle                 | ... c h! w! -> ... (c r) H! W!            | 0
    channel_shuffle                 | b c! ... -> b c! ...                      | 0
    im2col                          | ... c h! w! -> ... (c k) l!               | 0
    col2im                          | ... (c k) l! -> ... c h! w!               | 0
    grid_sampler grid_sampler_2d    | b c h! w!, b x y two! -> b c x y          | 0
    pad constant_pad_nd             | @pad                                      |
    tril triu                       | @triangle                                 |
    view reshape flatten unflatten unsqueeze squeeze _unsafe_view ravel | @view |
    transpose swapaxes swapdims transpose_copy                     | @transpose |
    t numpy_T                       | @reverse                                  |
    mT mH adjoint                   | @matrix_transpose                         |
    permute permute_copy            | @permute                                  |
    movedim moveaxis                | @movedim                                  |
    expand broadcast_to             | @expand                                   |
    repeat tile                     | @repeat                                   |
    repeat_interleave.self_int      | @repeat_interleave                        |
    select select_copy              | @select                                   |
    unbind                          | @unbind                                   |
    meshgrid                        | @meshgrid                                 |
    diagonal                        | @diagonal                                 |
    split split_with_sizes chunk slice narrow tensor_split         | @cut       |
    cat concat concatenate          | @cat                                      |
    stack                           | @stack                                    |
    hstack vstack row_stack dstack column_stack                    | @joined    | all
    atleast_1d atleast_2d atleast_3d                               | @view      |
    diag_embed                      | @diag_embed                               | 0
    view_as_complex                 | ... c! -> ...                             | 0
    view_as_real                    | ... -> ... c!                             | 0
    index _unsafe_index             | @index                                    |
    index_put _unsafe_index_put     | @index_put                                |
    index_select                    | @index_select                             |
    index_add index_copy index_fill index_reduce                   | @index_write |
    gather take_along_dim           | @gather                                   |
    scatter scatter_add scatter_reduce | @scatter                               |
    slice_scatter select_scatter    | @slice_scatter                            |
    searchsorted                    | @searchsorted                             |
    bucketize                       | @bucketize                                |
    one_hot                         | @one_hot                                  |
    isin.Tensor_Tensor              | ..., n! -> ...                            |
    hinge_embedding_loss poisson_nll_loss margin_ranking_loss      | @elementwise_loss |
    cosine_embedding_loss triplet_margin_loss multi_margin_loss multilabel_margin_loss | @row_loss |
    ctc_loss.Tensor                 | @ctc_loss                                 |
    pairwise_distance               | @pairwise_distance                        |
"""

WHOLE = """
    nonzero nonzero_static argwhere masked_select unique_dim unique_consecutive _unique _unique2 bincount
        | the shape of the result depends on all values
    item is_nonzero equal _is_all_true _is_any_true _assert_async
        | it asks one question of all values
    take put
        | its positions count the elements of all dims
    masked_scatter
        | where a value goes depends on the whole mask
    embedding_bag _embedding_bag
        | it gives the ends and sizes of all bags as well, which have no part
    linalg_eig linalg_eigvals
        | the phase of the eigenvectors is free: one device decides it
    linalg_multi_dot chain_matmul
        | in which order it multiplies depends on the sizes
    pdist combinations cartesian_prod block_diag vander cov corrcoef trace histogram
        | every result needs all rows, or lies among those of all rows
    quantile nanquantile
        | it sorts the dim, and the results of several quantiles come first
    as_strided view.dtype
        | it speaks of memory, not of dims
    istft affine_grid_generator
        | an argument gives the size of the whole batch, or the windows overlap
    lstm.data gru.data rnn_tanh.data rnn_relu.data _pack_padded_sequence _pad_packed_sequence ctc_loss.IntList
        | lengths of the whole batch are numbers of the program
    multinomial rrelu alpha_dropout feature_dropout feature_alpha_dropout native_dropout randint_like normal
    exponential uniform geometric cauchy log_normal random
        | it draws random numbers: a part of the draw is not a draw of the part
"""
"""Operators that stay whole on purpose, and why: their operands are gathered."""


@dataclass(frozen=True)
class Rule:
    """One row: the name, how the recipe is made, the text that made it, the linear sets as written, and where the
    operator stays whole on purpose, why.
    """

    name: str
    function: RuleFunction
    text: str
    linear: str = ""
    whole: str = ""


_MODULES = (pointwise, reductions, norms, contractions, views, indexing)
_rules: dict[str, Rule] = {}


def _linear_sets(text: str, call: Call) -> tuple[frozenset[int], ...]:
    if not text:
        return ()
    if text == "all":
        return () if call.affine else (frozenset(range(len(call.inputs))),)
    sets = (frozenset(map(int, part.split(","))) for part in text.split(";"))
    return tuple(s for s in sets if max(s) < len(call.inputs) and not (len(s) > 1 and call.affine))


def make_rule(name: str, text: str, linear: str = "", *, strict: bool = True) -> Rule:
    """A rule from a row of the table; ``@f`` names a rule function.

    Where a call does not fit a notation it is an error, or not strictly, the call is never split.
    """
    if text.startswith("@"):
        function = rule_function(text)
    else:
        notation = parse(text)

        def function(call: Call) -> Recipe:
            return apply(notation, call) if strict or fits(notation, call) else Recipe()

    return Rule(name, _with_linear(function, linear), text, linear)


def rule_function(text: str) -> RuleFunction:
    """The rule function that ``@name`` means."""
    for module in _MODULES:
        if hasattr(module, text[1:]):
            found: RuleFunction = getattr(module, text[1:])
            return found
    raise RuleError(f"there is no rule function {text!r}", fix="write a notation, or give a function")


def _with_linear(function: RuleFunction, linear: str) -> RuleFunction:
    def recipe(call: Call) -> Recipe:
        made = function(call)
        return Recipe(made.factors, made.linear or _linear_sets(linear, call), made.unread)

    return recipe


@cache
def table_rules() -> dict[str, Rule]:
    """The rules of the table by their names, without those that were registered."""
    rules: dict[str, Rule] = {}
    for operators, text, linear in [(POINTWISE, "@pointwise", ""), *_rows(TABLE)]:
        for operator in operators.split():
            name = operator.replace("::", ".") if "::" in operator else f"aten.{operator}"
            assert name not in rules, name
            rules[name] = make_rule(name, text, linear, strict=False)
    for operators, why in _rows(WHOLE):
        for name in (f"aten.{operator}" for operator in operators.split()):
            assert name not in rules, name
            rules[name] = Rule(name, pointwise.never, "@never", whole=why)
    return rules


def _load() -> None:
    _rules.update(table_rules())


def _rows(table: str) -> Iterator[list[str]]:
    """The cells of each row; the operators of one may fill several lines."""
    names = ""
    for line in table.strip().splitlines():
        first, *cells = [cell.strip() for cell in line.split("|")]
        names += f" {first}"
        if cells:
            yield [names, *cells]
            names = ""


@cache
def name_of(target: object) -> tuple[str, str]:
    """The two names under which a rule is looked up: with the overload, and without."""
    if isinstance(target, OpOverload):
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
    if isinstance(operator, OpOverload):
        name = name_of(operator)[0]
    elif isinstance(operator, OpOverloadPacket):
        name = operator._qualified_op_name.replace("::", ".")
    elif isinstance(operator, str):
        name = operator.replace("::", ".")
    else:
        raise RuleError(f"cannot register a rule for {operator!r}", fix="give torch.ops.lib.op, or 'lib::op'")
    if isinstance(rule, str):
        made = make_rule(name, rule, linear)
    else:
        made = Rule(name, _with_linear(rule, linear), getattr(rule, "__name__", "function"), linear)
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
