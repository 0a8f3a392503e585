"""Sample calls of operators beyond the everyday ones: experts, recurrent cells, linear algebra, rare pooling."""

from __future__ import annotations

from typing import Any

import torch

from tests.rules.samples import D, bools, call, ints, pos, r, samples


def offsets(groups: int, rows: int) -> torch.Tensor:
    """Where groups of rows end; one of them is empty."""
    ends = torch.randint(0, rows + 1, (groups - 1,)).sort().values
    ends[1] = ends[0]
    return torch.cat((ends, torch.tensor([rows]))).to(torch.int32)


@samples("_grouped_mm.default")
def _() -> list[Any]:
    f = lambda *shape: r(*shape).float()  # noqa: E731 (there is no double one)
    return [
        call(f(24, 48), f(4, 48, 96), offsets(4, 24)),
        call(f(24, 48), f(4, 96, 48).transpose(1, 2), offsets(4, 24)),
        call(f(4, 48, 96), f(96, 24), offsets(4, 24)),
        call(f(48, 24).t(), f(24, 96), offsets(4, 24), gradients=False),
        call(f(4, 48, 96), f(4, 96, 48)),
    ]


@samples("transformers::grouped_mm_fallback.default")
def _() -> list[Any]:
    return [
        call(r(24, 12), r(4, 12, 24), offsets(4, 24)),
        call(r(24, 12), r(4, 24, 12).transpose(1, 2), offsets(4, 24).long()),
    ]


@samples("histc.default")
def _() -> list[Any]:
    return [
        call(r(24), 6, -2, 2, gradients=False),
        call(ints(4, 12, 24).float(), 4, 0, 3, gradients=False),
        call(r(24), 6, gradients=False),
    ]


# Linear algebra: batches of small matrices.


def regular(*shape: int) -> torch.Tensor:
    """Matrices far from singular."""
    return r(*shape) * 0.2 + torch.eye(shape[-1], dtype=D) * 2


def definite(*shape: int) -> torch.Tensor:
    """Symmetric positive definite matrices."""
    return r(*shape) * 0.1 @ torch.eye(shape[-1], dtype=D) * 0 + torch.eye(shape[-1], dtype=D) * pos(*shape[:-2], 1, 1)


@samples(
    "linalg_inv.default", "inverse.default",
    "linalg_inv_ex.default", "linalg_det.default", "det.default", "linalg_slogdet.default", "slogdet.default",
    "linalg_lu_factor.default",
)  # fmt: skip
def _() -> list[Any]:
    return [call(regular(12, 4, 4)), call(regular(4, 12, 3, 3)), call(regular(6, 6))]


@samples("linalg_pinv.default")
def _() -> list[Any]:
    return [call(regular(12, 4, 4), 1e-9), call(r(12, 6, 4), 1e-9)]


@samples("linalg_matrix_exp.default", "matrix_exp.default")
def _() -> list[Any]:
    return [call(regular(12, 4, 4)), call(regular(4, 12, 3, 3))]


@samples("linalg_matrix_power.default", "matrix_power.default")
def _() -> list[Any]:
    return [call(regular(12, 4, 4), 3), call(regular(12, 4, 4), -1)]


@samples("linalg_cholesky.default", "cholesky.default", "linalg_cholesky_ex.default", "logdet.default")
def _() -> list[Any]:
    return [call(definite(12, 4, 4)), call(definite(4, 12, 3, 3)), call(definite(6, 6))]


@samples("cholesky_inverse.default")
def _() -> list[Any]:
    return [call(definite(12, 4, 4).sqrt()), call(definite(6, 6).sqrt())]


@samples("linalg_qr.default", "geqrf.default")
def _() -> list[Any]:
    return [call(regular(12, 4, 4), gradients=False), call(r(12, 6, 4), gradients=False)]


@samples("linalg_svd.default", "linalg_eigh.default", "linalg_svdvals.default", "linalg_eigvalsh.default")
def _() -> list[Any]:
    return [call(definite(12, 4, 4) + torch.diag(torch.arange(4.0, dtype=D)), gradients=False)]


@samples("linalg_solve.default", "linalg_solve_ex.default")
def _() -> list[Any]:
    return [
        call(regular(12, 4, 4), r(12, 4, 24)),
        call(regular(4, 4), r(4, 12)),
        call(regular(12, 12, 12), r(12, 12)),
        call(regular(12, 4, 4), r(12, 24, 4), left=False),
    ]


@samples("linalg_solve_triangular.default")
def _() -> list[Any]:
    return [
        call(regular(12, 4, 4).triu(), r(12, 4, 24), upper=True),
        call(regular(12, 4, 4).tril(), r(12, 24, 4), upper=False, left=False),
    ]


@samples("cholesky_solve.default")
def _() -> list[Any]:
    return [call(r(12, 4, 24), definite(12, 4, 4)), call(r(4, 12), definite(4, 4))]


@samples("linalg_matrix_norm.default")
def _() -> list[Any]:
    return [call(r(12, 4, 6), 1), call(r(4, 6, 12), 1, [0, 1]), call(r(12, 4, 6), 1, keepdim=True)]


@samples("linalg_norm.default")
def _() -> list[Any]:
    return [call(r(12, 24)), call(r(12, 24), 2, [1]), call(r(12, 4, 6), 1, [1, 2], True)]


# Products.


@samples("inner.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(6, 24)), call(r(24), r(24))]


@samples("kron.default")
def _() -> list[Any]:
    return [call(r(12, 4), r(6, 3)), call(r(12), r(12))]


@samples("addmv.default")
def _() -> list[Any]:
    return [call(r(12), r(12, 24), r(24)), call(r(12), r(12, 24), r(24), beta=2, alpha=3)]


@samples("addr.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(12), r(24)), call(r(12, 24), r(12), r(24), beta=2, alpha=3)]


@samples("addbmm.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(4, 12, 6), r(4, 6, 24))]


@samples("tensordot.default")
def _() -> list[Any]:
    return [
        call(r(12, 24), r(24, 6), [1], [0]),
        call(r(12, 4, 6), r(6, 12, 4), [0, 2], [1, 0]),
        call(r(12, 4), r(4, 12), [-1, 0], [0, 1]),
        call(r(12), r(6), [], []),
    ]


@samples("linalg_vecdot.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(12, 24)), call(r(12, 24), r(12, 24), dim=0)]


@samples("bilinear.default")
def _() -> list[Any]:
    return [call(r(6, 12), r(6, 24), r(4, 12, 24)), call(r(4, 6, 12), r(4, 6, 24), r(12, 12, 24), r(12))]


@samples("convolution.default")
def _() -> list[Any]:
    one: tuple[Any, ...] = ([1], [1], [1], False, [0])
    return [
        call(r(12, 6, 8), r(24, 6, 3), None, *one, 1),
        call(r(4, 24, 8), r(24, 1, 3), r(24), *one, 24),
        call(r(4, 6, 8), r(6, 12, 3), r(12), [2], [1], [1], True, [1], 1),
        call(r(4, 24, 8), r(24, 2, 3), None, [2], [1], [1], True, [1], 12),
    ]


# Attention, layers and cells that are one operator.


@samples("_scaled_dot_product_flash_attention_for_cpu.default")
def _() -> list[Any]:
    return [
        call(r(4, 12, 6, 8), r(4, 12, 6, 8), r(4, 12, 6, 8), gradients=False),
        call(r(4, 12, 6, 8), r(4, 12, 6, 8), r(4, 12, 6, 8), 0.0, True, gradients=False),
        call(r(2, 4, 12, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), attn_mask=r(2, 4, 12, 6), gradients=False),
    ]


def _encoder_weights(dim: int, hidden: int) -> tuple[Any, ...]:
    first = (r(3 * dim, dim), r(3 * dim), r(dim, dim), r(dim))
    return first, (r(dim), r(dim), r(dim), r(dim), r(hidden, dim), r(hidden), r(dim, hidden), r(dim))


@samples("_transformer_encoder_layer_fwd.default")
def _() -> list[Any]:
    attention, rest = _encoder_weights(8, 16)
    padded = torch.zeros(12, 5, dtype=torch.bool)
    padded[:6, 4] = True
    options: tuple[Any, ...] = (True, False, 1e-5)
    return [
        call(r(12, 5, 8), 8, 2, *attention, *options, *rest, gradients=False),
        call(r(12, 5, 8), 8, 2, *attention, *options, *rest, padded, 1, gradients=False),
        call(r(12, 5, 8), 8, 2, *attention, *options, *rest, bools(5, 5).tril().logical_not(), 0, gradients=False),
    ]


@samples("_native_multi_head_attention.default")
def _() -> list[Any]:
    attention, _ = _encoder_weights(8, 16)
    x = r(12, 5, 8)
    return [call(x, x, x, 8, 2, *attention, gradients=False)]


def _cells(gates: int, layers: int = 2) -> list[torch.Tensor]:
    """The weights of recurrent layers of 6 features and 4 units."""
    out = []
    for layer in range(layers):
        out += [r(4 * gates, 4 if layer else 6), r(4 * gates, 4), r(4 * gates), r(4 * gates)]
    return out


@samples("lstm.input")
def _() -> list[Any]:
    state = [r(2, 12, 4), r(2, 12, 4)]
    return [
        call(r(5, 12, 6), state, _cells(4), True, 2, 0.0, True, False, False),
        call(r(12, 5, 6), state, _cells(4), True, 2, 0.0, False, False, True),
        call(r(12, 5, 6), state, _cells(4), True, 2, 0.5, True, False, True, gradients=False),
    ]


@samples("gru.input")
def _() -> list[Any]:
    return [
        call(r(5, 12, 6), r(2, 12, 4), _cells(3), True, 2, 0.0, True, False, False),
        call(r(12, 5, 6), r(2, 12, 4), _cells(3), True, 2, 0.0, False, False, True),
    ]


@samples("rnn_tanh.input", "rnn_relu.input")
def _() -> list[Any]:
    return [call(r(5, 12, 6), r(2, 12, 4), _cells(1), True, 2, 0.0, True, False, False)]


@samples("lstm_cell.default")
def _() -> list[Any]:
    return [call(r(12, 6), [r(12, 4), r(12, 4)], *_cells(4, 1))]


@samples("gru_cell.default")
def _() -> list[Any]:
    return [call(r(12, 6), r(12, 4), *_cells(3, 1))]


@samples("rnn_tanh_cell.default", "rnn_relu_cell.default")
def _() -> list[Any]:
    return [call(r(12, 6), r(12, 4), *_cells(1, 1))]


# Pooling, padding, images and signals.


@samples("max_pool1d_with_indices.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8), [2])]


@samples("adaptive_max_pool1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8), [4]), call(r(12, 8), [4])]


@samples("max_pool3d_with_indices.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), [2, 2, 2])]


@samples("adaptive_max_pool3d.default", "_adaptive_avg_pool3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), [2, 2, 2])]


@samples("_adaptive_avg_pool2d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4), [2, 2])]


@samples("fractional_max_pool2d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8, 8), [2, 2], [4, 4], pos(4, 12, 2), constants=(1,))]


@samples("max_unpool2d.default")
def _() -> list[Any]:
    return [call(*torch.nn.functional.max_pool2d(r(4, 12, 8, 8), 2, return_indices=True), [8, 8])]


@samples("max_unpool3d.default")
def _() -> list[Any]:
    pooled = torch.nn.functional.max_pool3d(r(4, 12, 4, 4, 4), 2, return_indices=True)
    return [call(*pooled, [4, 4, 4], [2, 2, 2], [0, 0, 0])]


@samples("reflection_pad1d.default", "replication_pad1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8), [1, 2])]


@samples("reflection_pad3d.default", "replication_pad3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), [1, 1, 0, 1, 1, 1])]


@samples("_upsample_nearest_exact1d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 8), [12])]


@samples("_upsample_nearest_exact3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), [6, 6, 6])]


@samples("grid_sampler_3d.default")
def _() -> list[Any]:
    return [call(r(4, 12, 4, 4, 4), pos(4, 6, 6, 6, 3), 0, 0, False)]


@samples("stft.default")
def _() -> list[Any]:
    window = torch.hann_window(8, dtype=D)
    return [
        call(r(12, 32), 8, 4, 8, window, return_complex=True, constants=(1,)),
        call(r(12, 32), 8, return_complex=True),
        call(r(32), 8, return_complex=False),
    ]


# Views and scans.


@samples("hstack.default", "column_stack.default")
def _() -> list[Any]:
    return [call([r(12, 4), r(12, 6)]), call([r(12), r(12)])]


@samples("vstack.default", "row_stack.default")
def _() -> list[Any]:
    return [call([r(4, 12), r(6, 12)]), call([r(12), r(12)])]


@samples("dstack.default")
def _() -> list[Any]:
    return [call([r(4, 12, 2), r(4, 12, 3)]), call([r(4, 12), r(4, 12)])]


@samples("atleast_1d.default", "atleast_2d.default", "atleast_3d.default")
def _() -> list[Any]:
    return [call(r(12)), call(r(12, 4)), call(r(2, 12, 4))]


@samples("diag_embed.default")
def _() -> list[Any]:
    return [call(r(12, 4)), call(r(4, 12, 6), 1), call(r(12, 4), 0, 0, 2)]


@samples("msort.default", "flipud.default", "fliplr.default")
def _() -> list[Any]:
    return [call(r(6, 12)), call(r(6, 4, 12)), call(r(12, 4))]


@samples("rot90.default")
def _() -> list[Any]:
    return [call(r(6, 12)), call(r(6, 4, 12)), call(r(12, 4, 4), 3, [1, 2])]


@samples("index_reduce.default")
def _() -> list[Any]:
    return [call(r(12, 24), 1, ints(24, 6), r(12, 6), reduce, gradients=False) for reduce in ("amax", "prod", "mean")]


@samples("isin.Tensor_Tensor")
def _() -> list[Any]:
    return [call(ints(9, 12, 24), ints(9, 4)), call(ints(9, 12), ints(9, 12), invert=True)]


@samples("nanmean.default")
def _() -> list[Any]:
    return [call(r(12, 24), [1]), call(r(12, 24))]


# Losses.


@samples("hinge_embedding_loss.default")
def _() -> list[Any]:
    return [call(r(12, 24), ints(2, 12, 24).to(D) * 2 - 1, 1.0, n, constants=(1,)) for n in (0, 1, 2)]


@samples("poisson_nll_loss.default")
def _() -> list[Any]:
    return [call(r(12, 24), pos(12, 24), True, True, 1e-8, n) for n in (0, 1, 2)]


@samples("margin_ranking_loss.default")
def _() -> list[Any]:
    return [call(r(12), r(12), ints(2, 12).to(D) * 2 - 1, 0.1, n, constants=(2,)) for n in (0, 1, 2)]


@samples("cosine_embedding_loss.default")
def _() -> list[Any]:
    return [call(r(12, 6), r(12, 6), ints(2, 12) * 2 - 1, 0.1, n) for n in (0, 1, 2)]


@samples("triplet_margin_loss.default")
def _() -> list[Any]:
    return [call(r(12, 6), r(12, 6), r(12, 6), reduction=n) for n in (0, 1, 2)]


@samples("multi_margin_loss.default")
def _() -> list[Any]:
    return [call(r(12, 6), ints(6, 12), reduction=n) for n in (0, 1, 2)]


@samples("multilabel_margin_loss.default")
def _() -> list[Any]:
    return [call(r(12, 6), ints(6, 12, 6), n) for n in (0, 1, 2)]


@samples("ctc_loss.Tensor")
def _() -> list[Any]:
    logits = r(10, 12, 6).log_softmax(-1)
    lengths = (torch.full((12,), 10), ints(3, 12) + 1)
    return [call(logits, ints(5, 12, 4) + 1, *lengths, 0, n) for n in (0, 1, 2)]


@samples("pairwise_distance.default")
def _() -> list[Any]:
    return [call(r(12, 24), r(12, 24)), call(r(12, 24), r(24), keepdim=True)]
