"""Statements in text: what stands in braces is filled in by ``programs.py``.

``a`` a floating-point value (``a3``: of three dims), ``b`` one of the same shape, ``c`` one that broadcasts with it,
``ids`` integers; ``d`` and ``e`` dims of ``a``, ``n`` the size of ``d``, ``k`` an index of it, ``m`` a small number,
``dims`` a list of dims, ``last`` the size of the last dim, ``out`` a size, ``f`` a number, ``s`` the shape of ``a``,
``w`` a new parameter of the last dim's size, ``W`` one of ``[out, last]``, ``p`` one of the shape of ``a``, ``buf`` a
new buffer of the last dim's size, ``M`` the module that is named before ``|``, ``o`` the new value. ``\\n`` is the
end of a line, and ``;;`` that of a form. A form that does not fit what it is given fails when it is tried, and is
then dropped.
"""

from __future__ import annotations

from itertools import chain


def _forms(text: str) -> list[str]:
    return [form.strip().replace("\\n", "\n") for form in text.split(";;")]


_EXPRESSIONS = {
    "views": r"""
{a}.transpose({d}, {e}) ;; {a}.unsqueeze({d}) ;; {a}.squeeze({d}) ;; {a}.flatten({d}, -1) ;; {a}.reshape(-1) ;;
{a}.reshape(-1, {last}) ;; {a}.unflatten({d}, ({m}, -1)) ;; {a}.reshape({n}, -1) ;; {a}.expand({m}, *{s}) ;;
{a}.permute(*range({a}.dim() - 1, -1, -1)) ;; {a}.movedim({d}, {e}) ;; {a}.view(*{s}[:-1], {m}, -1) ;;
{a}.narrow({d}, {k}, 1) ;; {a}.select({d}, {k}) ;; {a}[..., ::2] ;; {a}[..., {k}:] ;; {a}[-2:] ;; {a}[{k}] ;;
{a}[..., None, :] ;; {a}[:, :0] ;; {a}.unfold({d}, 2, 1) ;; {a}.diagonal() ;;
{a}.repeat({m}, *[1] * ({a}.dim() - 1)) ;; {a}.repeat_interleave({m}, {d}) ;; torch.tile({a}, (2,)) ;;
{a}.broadcast_to({m}, *{s}) ;; {a}.view_as({b}) ;; {a}.swapaxes(0, -1) ;; torch.atleast_2d({a}) ;;
{a}.as_strided((2, 2), (1, 2)) ;; {a}.to(torch.float32).to({a}.dtype)
""",
    "pieces and lists": r"""
{a}.split({m}, {d})[0] ;; {a}.split({n}, {d})[0] ;; {a}.split([{k}, {n} - {k}], {d})[-1] ;;
{a}.chunk({m}, {d})[-1] ;; {a}.chunk(1, {d})[0] ;; torch.cat([c.tanh() for c in {a}.split({m}, {d})], {d}) ;;
torch.cat([{a}], {d}) ;; torch.cat([{a}, {b}], {d}) ;; torch.cat([{a}, {b}, {a}], {d}) ;;
torch.stack([{a}, {b}], {d}) ;; torch.stack([{a}]) ;; torch.cat([{a}, {a}[..., :0]], -1) ;; sum({a}.unbind({d})) ;;
sum({a}[:0].unbind(0), {a}) ;; torch.stack({a}.unbind({d})[::-1]) ;; {a}.tensor_split(({k},), {d})[-1] ;;
torch.cat({a}.tensor_split([], {d}), {d}) ;; {a}.tensor_split({m}, {d})[0] ;; torch.hstack([{a}, {b}]) ;;
torch.vstack(({a},)) ;; torch.meshgrid({a}.flatten()[:3], {b}.flatten()[:2], indexing='ij')[1] ;;
torch.stack(torch._foreach_mul([{a}, {b}], 2.0)) ;; torch.block_diag({a2}, {b}) ;;
torch.cartesian_prod({a}.flatten()[:3]) ;; torch.broadcast_tensors({a}, {c})[0] ;; tuple({a}.unbind(0))[{k}] ;;
list({a}.chunk(2))[0] ;; dict(y={a})['y'] + 1
""",
    "arithmetic": r"""
{a} + {c} ;; {a} - {b} ;; {a} * {c} ;; {a} / (1 + {b} * {b}) ;; {a} ** 2 ;; 2 - {a} ;; {a} + 1 ;;
1 / ({a} * {a} + 1) ;; torch.maximum({a}, {c}) ;; torch.where({a} > {b}, {a}, {c}) ;;
torch.where({a} > 0, {a}, 0.1) ;; torch.lerp({a}, {b}, {f}) ;; torch.addcmul({a}, {b}, {c}) ;;
torch.addcdiv({a}, {b}, {b} * {b} + 1) ;; {a}.clamp(-{f}, {f}) ;; {a}.clamp(min={c}) ;;
{a}.masked_fill({b} > 0, {f}) ;; torch.add({a}, {c}, alpha=2) ;; ({a} > 0).to({a}.dtype) * {b} ;;
({a} > {c}) & ({a} < 1) ;; torch.atan2({a}, {b}) ;; torch.hypot({a}, {b}) ;; torch.fmod({a}, 0.7) ;;
torch.remainder({a}, 0.7) ;; ({a} * 4).long() ;; torch.logaddexp({a}, {b}) ;; {a}.float().double() ;;
torch.complex({a}, {b}).abs() ;; torch.polar({a}.abs() + 1, {b}).real ;; torch.isclose({a}, {b}) ;;
torch.heaviside({a}, {b}) ;; torch.copysign({a}, {c}) ;; {a}.sign() * {a}.abs().sqrt()
""",
    "reductions and what runs along dims": r"""
{a}.sum() ;; {a}.mean() ;; {a}.max() ;; {a}.sum({dims}, keepdim=True) ;; {a}.mean({dims}) ;; {a}.amax({dims}) ;;
{a}.var({dims}, correction=0) ;; {a}.std() ;; torch.linalg.vector_norm({a}, dim={dims}) ;; {a}.norm() ;;
{a}.argmax() ;; {a} - {a}.mean({d}, keepdim=True) ;; {a}.softmax({d}) ;; {a}.log_softmax({d}) ;; {a}.cumsum({d}) ;;
{a}.flip({d}) ;; {a}.roll({k}, {d}) ;; {a}.sort({d}).values ;; {a}.sort({d}, descending=True)[1] ;;
{a}.topk(1, {d}).values ;; {a}.argsort({d}) ;; {a}.gather({d}, {a}.argsort({d})) ;;
{a}.index_select({d}, torch.tensor([0, {k}, 0])) ;; {a}.take_along_dim({a}.argsort({d}), {d}) ;; {a}.cumprod({d}) ;;
{a}.logsumexp({dims}) ;; {a}.median({d}).values ;; {a}.kthvalue(1, {d})[0] ;; {a}.diff(dim={d}) ;; {a}.unique() ;;
{a}[{a} > 0] ;; {a}.nonzero() ;; {a}.masked_select({b} > 0).sum() ;; torch.quantile({a}, 0.5, dim={d}) ;;
torch.trapezoid({a}, dim={d}) ;; torch.searchsorted({a}.sort(-1).values, {b}) ;; torch.histc({a}, 4) ;;
{a}.tril() ;; {a}.triu(1) ;; {a}.count_nonzero({d}) ;; {a}.prod({d}) ;; {a}.aminmax(dim={d})[1] ;;
torch.renorm({a}, 2, 0, 1.0) ;; {a}.scatter({d}, {a}.argsort({d}), {b}) ;;
torch.zeros_like({a}).scatter_add({d}, {a}.argmax({d}, keepdim=True), {b}) ;;
{a}.index_add({d}, torch.tensor([0]), {b}.narrow({d}, 0, 1)) ;; torch.cov({a2}) ;; torch.cdist({a2}, {b}) ;;
{a}.index_put((torch.tensor([0]),), {b}[:1]) ;; torch.bincount({ids}.flatten()).sum() * {a} ;;
F.one_hot({ids} % 4, 4) * 1.0 ;; F.one_hot({ids} % 5).sum(-1) ;; {a}[{ids}.flatten()[:3] % {s}[0]] ;;
{a}[:, {ids}.flatten()[:2] % 2]
""",
    "products": r"""
{a} @ {b}.mT ;; {a}.mT @ {b} ;; {a2} @ {W}.T ;; F.linear({a}, {W}) ;; F.linear({a}, {W}, {W}[:, 0]) ;; {a} * {w} ;;
{a} + {w} ;; {a} * {p} ;; {w} - {a} ;; torch.einsum('...d,ed->...e', {a}, {W}) ;;
torch.einsum('bid,bjd->bij', {a3}, {b}) ;; torch.einsum('ij,ij->', {a2}, {b}) ;;
torch.einsum('bid,bjd->jd', {a3}, {b}) ;; torch.bmm({a3}, {b}.mT) ;; torch.addmm({a2} @ {b}.mT, {a2}, {b}.mT) ;;
torch.outer({a1}, {b}) ;; torch.tensordot({a}, {W}, ([-1], [1])) ;;
torch.baddbmm({a3} @ {b}.mT, {a3}, {b}.mT, beta=0.5) ;; torch.mv({a2}, {w}) ;; torch.dot({a1}, {b}) ;;
torch.kron({a2}, {w}[None, :2]) ;; F.bilinear({a}, {b}, {p}.flatten()[:{last}].outer({w})[None]) ;;
torch.linalg.multi_dot([{a2}, {b}.mT, {a2}]) ;; torch.matrix_exp({a2} @ {b}.mT * 0.01) ;;
torch.linalg.inv({a2} @ {a2}.mT + 3 * torch.eye({a2}.shape[0]))
""",
    "functional": r"""
F.layer_norm({a}, ({last},), {w}) ;; F.rms_norm({a}, ({last},), {w}, 1e-5) ;; F.normalize({a}, dim={d}) ;;
F.glu({a}, {d}) ;; F.pad({a}, (1, 1)) ;; F.pad({a}, (-1, 0)) ;; F.pad({a3}, (1, 1), 'reflect') ;;
F.embedding({ids}, {W}) ;; F.embedding({ids} % {out}, {W}, padding_idx=0) ;; F.embedding_bag({ids}, {W}) ;;
F.scaled_dot_product_attention({a3}, {b}, {a3}) ;;
F.scaled_dot_product_attention({a3}[:, None], {b}[:, None], {a3}[:, None], is_causal=True) ;;
F.conv1d({a3}, {p}[:1], padding=1) ;; F.conv2d({a4}, {p}, padding=1) ;; F.max_pool1d({a3}, 2) ;;
F.avg_pool1d({a3}, 2) ;; F.avg_pool2d({a4}, 2) ;; F.max_pool2d({a4}, 2) ;; F.interpolate({a3}, scale_factor=2) ;;
F.interpolate({a4}, scale_factor=2, mode='bilinear') ;; F.adaptive_avg_pool1d({a3}, 2) ;;
F.pixel_shuffle({a4}, 2) ;; F.unfold({a4}, 2) ;; F.mse_loss({a}, {b}) ;; F.l1_loss({a}, {b}, reduction='sum') ;;
F.smooth_l1_loss({a}, {b}, reduction='none') ;; F.cross_entropy({a2}, {a2}.argmax(-1)) ;; F.huber_loss({a}, {b}) ;;
F.cross_entropy({a2}, {b}.argmin(-1), reduction='sum', label_smoothing=0.1) ;;
F.nll_loss({a2}.log_softmax(-1), {a2}.argmax(-1)) ;; F.cross_entropy({a3}, {b}.argmin(1), {p}[0, :, 0].abs()) ;;
F.binary_cross_entropy_with_logits({a}, {b}.sigmoid()) ;;
F.kl_div({a}.log_softmax(-1), {b}.softmax(-1), reduction='batchmean') ;;
F.gaussian_nll_loss({a}, {b}, {b} ** 2 + 1) ;; F.cosine_similarity({a}, {b}, dim={d}) ;; F.softmin({a}, {d}) ;;
F.local_response_norm({a3}, 2) ;; F.group_norm({a3}, 1) ;; F.instance_norm({a3}) ;;
F.batch_norm({a2}, {buf}, {buf}.abs() + 1, training=self.training) ;; torch.fft.rfft({a}).abs() ;;
torch.fft.fft({a}, dim={d}).real ;; torch.stft({a2}.repeat(1, 4), 8, return_complex=True).abs() ;;
torch.view_as_real(torch.complex({a}, {b}))
""",
    "draws": r"""
F.dropout({a}, 0.4, self.training) ;; F.dropout({a}, 0.4) ;; F.dropout1d({a3}, 0.5, self.training) ;;
F.alpha_dropout({a}, 0.3, self.training) ;; F.rrelu({a}, training=self.training) ;; {a} + torch.rand_like({a}) ;;
{a} * torch.rand(()) ;; {a} + torch.randn({last}) ;; torch.bernoulli({a}.sigmoid()) ;;
{a}[torch.randperm({s}[0])] ;; torch.randint(0, 5, ({m},)) ;; F.gumbel_softmax({a}, dim={d}) ;;
torch.multinomial({a2}.softmax(-1), 2) ;; torch.normal({a}, 0.1)
""",
    "made of nothing, and shapes": r"""
torch.arange({last}) + {a} ;; torch.zeros({s}) + {a} ;; torch.full_like({a}, {f}) * {b} ;;
{a}.new_ones({m}, {last}) ;; {a} * {a}.shape[0] ;; {a} / {a}.numel() ;; torch.eye({last}) @ {a}[..., None] ;;
torch.linspace(0, 1, {last}) * {a} ;; torch.tensor([1.0, 2.0])[{k} % 2] * {a} ;; {a} * len({a})
""",
    "functions and regions": r"""
Twice.apply({a}) ;; Gated.apply({a}, {b})[0] ;; checkpoint(lambda t: t.tanh() * {b}, {a}, use_reentrant=False) ;;
checkpoint(torch.sin, {a}, use_reentrant=False) ;; torch.vmap(lambda t: t * 2)({a}) ;;
torch.cond({a}.sum() > 0, lambda t: t + 1, lambda t: t * 2, ({a},))
""",
}
_UNARY = """
relu ;; tanh ;; sigmoid ;; sin ;; cos ;; exp ;; abs ;; neg ;; sqrt ;; erf ;; floor ;; round ;; sign ;; trunc ;;
frac ;; log1p ;; expm1 ;; square ;; rsqrt ;; atan ;; sinh ;; asinh ;; nan_to_num ;; detach ;; clone ;; contiguous ;;
t ;; mT ;; flatten ;; squeeze ;; ravel ;; isfinite ;; isnan ;; logical_not ;; positive
"""
_FUNCTIONAL = """
gelu ;; silu ;; mish ;; softplus ;; softsign ;; hardswish ;; hardsigmoid ;; elu ;; selu ;; celu ;; leaky_relu ;;
relu6 ;; logsigmoid ;; tanhshrink ;; hardtanh ;; softshrink ;; hardshrink
"""
_ALONG = """
softmax ;; log_softmax ;; cumsum ;; cumprod ;; logcumsumexp ;; sort ;; argsort ;; topk ;; kthvalue ;; median ;;
mode ;; max ;; min ;; argmax ;; argmin ;; amax ;; amin ;; sum ;; mean ;; std ;; var ;; logsumexp ;; prod ;; any ;;
all ;; norm ;; cummax ;; cummin ;; unbind ;; flip ;; roll ;; diff ;; count_nonzero
"""
_IN_PLACE = """
relu_ ;; tanh_ ;; sigmoid_ ;; neg_ ;; abs_ ;; sin_ ;; exp_ ;; zero_ ;; square_ ;; clamp_(-1,1) ;; mul_(2) ;;
add_(1) ;; div_(3) ;; sub_(0.5) ;; fill_(0.5) ;; floor_ ;; pow_(2) ;; t_ ;; unsqueeze_(0) ;; squeeze_ ;;
masked_fill_({a}>0,0.25) ;; cumsum_({d}) ;; copy_({b}) ;; add_({c}) ;; mul_({b}) ;; addcmul_({b},{b}) ;;
lerp_({b},0.3) ;; transpose_({d},{e}) ;; clamp_min_(0) ;; tril_ ;; random_(5) ;; normal_ ;; uniform_ ;;
bernoulli_(0.4) ;; index_fill_({d},torch.tensor([0]),2.0)
"""
EXPRESSIONS = [
    *chain.from_iterable(map(_forms, _EXPRESSIONS.values())),
    *(f"{{a}}.{name}()" for name in _forms(_UNARY)),
    *(f"F.{name}({{a}})" for name in _forms(_FUNCTIONAL)),
    *(f"torch.{name}({{a}}, {{d}})" for name in _forms(_ALONG)),
]
_STATEMENTS = r"""
{o} = {a}.clone()\n{o}[{k}:].mul_(2) ;; {o} = {a}.clone()\n{o}.select({d}, {k}).add_({f}) ;;
{o} = {a} * 1\n{o}[..., 0] = {f} ;; {o} = torch.zeros({s})\n{o}[:] = {a} ;;
{o} = {a} + 0\n{o}.view(-1)[::2].neg_() ;; {o} = {a}.clone()\nfor piece in {o}.split(2, {d}):\n    piece.mul_(3) ;;
{o} = {a}.clone()\n{o}.narrow({d}, 0, 1).copy_({b}.narrow({d}, {k}, 1)) ;; {o} = {a} * 2\n{o} += {c} ;;
{o} = {a} * 2\n{o} *= {o} ;; with torch.no_grad():\n    {o} = {a} * 2 ;;
with torch.no_grad():\n    {o} = {a}.abs().mean() + {b} ;;
with torch.no_grad():\n    {buf}.add_({a}.reshape(-1, {last}).mean(0))\n{o} = {a} + 1 ;;
with torch.enable_grad():\n    {o} = {a} * 3 ;;
{buf}.mul_(0.9).add_({a}.detach().reshape(-1, {last}).sum(0), alpha=0.1)\n{o} = {a} * 1 ;;
{buf}.copy_({a}.detach().reshape(-1, {last})[0])\n{o} = {a} - 1 ;; {buf}.zero_()\n{o} = {a} + 0 ;;
{buf}[0] = {f}\n{o} = {a} + {buf} ;; torch.rand(3)\n{o} = {a} * 1 ;;
F.dropout({a}, 0.5, self.training)\n{o} = {a} + 0 ;;
if self.training:\n    {o} = {a} * 2\nelse:\n    {o} = {a} - 1 ;;
{o} = {a}\nfor i in range({m}):\n    {o} = ({o} + i).tanh() ;; {a}.mul_(2)\n{o} = {a} + 1 ;;
{o} = {a}.detach()\n{o}.add_(1) ;;
{o} = {a}.clone().requires_grad_(False) if {a}.requires_grad is False else {a} * 2 ;;
{o} = {a} * (2 if torch.is_grad_enabled() else 3) ;; {o} = {a}.split(2, {d})[0]\n{o} = {o}.clone().relu_() ;;
{o} = {a}.unsqueeze(0).clone()\n{o}[0].exp_()
"""
STATEMENTS = [
    *_forms(_STATEMENTS),
    *(f"{{o}} = {{a}}.clone()\n{{o}}.{name}{'' if name.endswith(')') else '()'}" for name in _forms(_IN_PLACE)),
]
MODULES = _forms(
    r"""
nn.Linear({last}, {out}) | {M}({a}) ;; nn.Linear({last}, {out}, bias=False) | {M}({a}) ;;
nn.Linear({last}, {last}) | {a} + {M}({a}) ;; nn.Linear({last}, {out}) | {M}({M}({a})[..., :1] + {a}) ;;
nn.LayerNorm({last}) | {M}({a}) ;; nn.RMSNorm({last}) | {M}({a}) ;;
nn.LayerNorm({last}, elementwise_affine=False) | {M}({a}) ;; nn.Embedding(16, {out}) | {M}({ids}) ;;
nn.Embedding(16, {last}, padding_idx=3) | {M}({ids} % 16)[..., None, :] + {a} ;;
nn.Embedding(16, {last}) | F.linear({a}, {M}.weight) + {M}.weight.sum() ;;
nn.EmbeddingBag(16, {out}) | {M}({ids}) ;; nn.BatchNorm1d({last}) | {M}({a2}) ;; nn.BatchNorm1d({n}) | {M}({a3}) ;;
nn.BatchNorm2d({n}) | {M}({a4}) ;; nn.BatchNorm1d({last}, momentum=None) | {M}({a2}) ;;
nn.BatchNorm1d({last}, affine=False) | {M}({a}.reshape(-1, {last})) ;;
nn.BatchNorm1d({last}, track_running_stats=False) | {M}({a}.reshape(-1, {last})) ;;
nn.InstanceNorm1d({n}, affine=True, track_running_stats=True) | {M}({a3}) ;; nn.GroupNorm({m}, {n}) | {M}({a3}) ;;
nn.GroupNorm(1, {n}) | {M}({a4}) ;; nn.Conv1d({n}, {out}, 3, padding=1) | {M}({a3}) ;;
nn.Conv1d({n}, {n}, 1, groups={n}) | {M}({a3}) ;; nn.Conv2d({n}, 4, 3, padding=1) | {M}({a4}) ;;
nn.ConvTranspose1d({n}, 4, 2) | {M}({a3}) ;; nn.ConvTranspose2d({n}, 2, 2, stride=2) | {M}({a4}) ;;
nn.Conv2d({n}, {n}, 3, padding=1, groups={n}, bias=False) | {M}({a4}) ;; nn.Dropout(0.4) | {M}({a}) ;;
nn.Dropout2d(0.4) | {M}({a4}) ;; nn.Dropout1d(0.4) | {M}({a3}) + {a3} ;; nn.PReLU() | {M}({a}) ;;
nn.PReLU({n}) | {M}({a3}) ;; nn.LSTM({last}, 4, batch_first=True) | {M}({a3})[0] ;;
nn.GRU({last}, 4) | {M}({a3})[0] ;; nn.LSTM({last}, 4, 2, dropout=0.4) | {M}({a3})[1][0] ;;
nn.RNN({last}, 3) | {M}({a3})[1] ;; nn.GRUCell({last}, 4) | {M}({a2}) ;;
nn.MultiheadAttention({last}, 1, batch_first=True) | {M}({a3}, {a3}, {a3})[0] ;;
nn.MultiheadAttention({last}, 2, dropout=0.2) | {M}({a3}, {b}, {a3}, need_weights=False)[0] ;;
nn.TransformerEncoderLayer({last}, 2, 8, 0.1, batch_first=True) | {M}({a3}) ;;
nn.Bilinear({last}, {last}, {out}) | {M}({a}, {b}) ;;
nn.CrossEntropyLoss(label_smoothing=0.1) | {M}({a2}, {a2}.argmax(-1)) ;; nn.Softmax({d}) | {M}({a}) ;;
Running({last}) | {M}({a}) ;; Running({last}, by_assignment=True) | {M}({a}) ;; Scaled() | {M}({a}) ;;
MLP({last}, {out}) | {M}({a}) ;; MLP({last}, {out}, 'gated', bias=False) | {M}({a}) ;;
MLP({last}, {out}, 'fused') | {M}({a}) ;; Attention({last}, {m}) | {M}({a3}) ;;
Attention({last}, {m}, 'causal') | {M}({a3}) ;; Attention({last}, {m}, 'by hand', 0.3) | {M}({a3}) ;;
Attention({last}, 2, 'fused', 0.3) | {M}({a3}) ;; MLP({last}, {out}) | checkpoint({M}, {a}, use_reentrant=False) ;;
nn.Sequential(nn.Linear({last}, {out}), nn.Dropout(0.3), nn.ReLU()) | checkpoint({M}, {a}, use_reentrant=False) ;;
nn.Sequential(nn.Linear({last}, {out}), nn.ReLU(inplace=True), nn.Linear({out}, {last})) | {a} + {M}({a}) ;;
nn.ModuleList(nn.Linear({last}, {last}) for _ in range(3)) | sum(m({a}) for m in {M}) ;;
nn.ParameterDict({{'u': torch.randn({last}), 'z': torch.randn({last})}}) | {M}['u'] * {a} + {M}['z'] ;;
nn.utils.parametrizations.weight_norm(nn.Linear({last}, {out})) | {M}({a}) ;;
nn.utils.parametrizations.spectral_norm(nn.Linear({last}, {out})) | {M}({a}) ;; nn.MaxPool1d(2) | {M}({a3}) ;;
nn.Upsample(scale_factor=2) | {M}({a3}) ;; nn.Flatten() | {M}({a}) ;; nn.Identity() | {M}({a})
"""
)
STATE = {
    "dict": _forms(
        r"""
{o} = {a} + state['h'] ;; state['h'] = state['h'] + {a}.mean()\n{o} = {a} * 1 ;;
state['h'].add_(1)\n{o} = {a} * state['h'] ;; state['seen'] = {a}\n{o} = {a} + 1 ;; {o} = {a} + state.pop('n', 0) ;;
state['n'] = state['n'] + 1\n{o} = {a} * state['n']
"""
    ),
    "list": _forms(
        r"""
state.append({a})\n{o} = {a} + state[0] ;; state[0] = {a}.sum()\n{o} = {a} - state[0] ;; {o} = sum(state) * {a} ;;
state[0].mul_(2)\n{o} = {a} + state[0] ;; state[:] = [s * 2 for s in state]\n{o} = {a} + state[0]
"""
    ),
}
