"""The models of ``models.py`` as an expert splits them over two ranks by hand, in straight-line code.

Each takes the whole model, keeps its own parts of the weights under the same names, and computes the same. With
``sequence`` what lies between column and row layers is split along the sequence (Megatron's sequence parallelism);
then the gradients of what every rank holds whole there are summed at the end of the backward pass, in one all-reduce.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks.megatron import Copy, Gather, Own, Reduce, Scatter
from benchmarks.models import head_dim, rotate

COLUMN = ("up", "gate", "q", "k", "v", "up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "lm_head", "embed_tokens")
ROW = ("down", "o", "down_proj", "o_proj")


def split_dim(name: str) -> int | None:
    """The dim along which a weight of a model is split; None where every rank holds it whole."""
    owner, _, last = name.rpartition(".")
    layer = owner.rpartition(".")[2]
    if layer in COLUMN:
        return 0
    return 1 if layer in ROW and last == "weight" else None


class Handwritten:
    """A model of this rank.

    Attributes:
        weights: this rank's part of every weight, under the model's own names.
    """

    def __init__(self, model: nn.Module, sequence: bool) -> None:
        self.sequence, self.rank = sequence, dist.get_rank()
        self.weights: dict[str, nn.Parameter] = {}
        for name, whole in model.named_parameters():
            dim = split_dim(name)
            part = whole.detach() if dim is None else whole.detach().chunk(2, dim)[self.rank]
            self.weights[name] = nn.Parameter(part.clone())
        norms = [w for name, w in self.weights.items() if "norm" in name or name == "down.bias"]
        self.summed = norms if sequence else []

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What a column layer reads."""
        return Gather.apply(x, 1, True) if self.sequence else Copy.apply(x)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """What a row layer gives."""
        return Scatter.apply(x, 1) if self.sequence else Reduce.apply(x)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """The part of a whole input that lies between the pairs."""
        return Own.apply(x, 1) if self.sequence else x

    def end(self, x: torch.Tensor) -> torch.Tensor:
        """The whole of what lies between the pairs."""
        return Gather.apply(x, 1, False) if self.sequence else x

    def finish(self) -> None:
        """After a backward pass: sums what each rank has a summand of."""
        if self.summed:
            grads = [w.grad for w in self.summed]
            flat = torch.cat([g.view(-1) for g in grads])
            dist.all_reduce(flat)
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))


class MLP(Handwritten):
    def __init__(self, model: nn.Module, sequence: bool) -> None:
        super().__init__(model, sequence)
        w = self.weights
        self.norm, self.norm_bias, self.shape = w["norm.weight"], w["norm.bias"], model.norm.normalized_shape
        self.up, self.up_bias = w["up.weight"], w["up.bias"]
        self.down, self.down_bias = w["down.weight"], w["down.bias"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        h = self.enter(F.layer_norm(x, self.shape, self.norm, self.norm_bias))
        h = F.gelu(F.linear(h, self.up, self.up_bias))
        return self.end(x + (self.leave(F.linear(h, self.down)) + self.down_bias))


class SwiGLU(Handwritten):
    def __init__(self, model: nn.Module, sequence: bool) -> None:
        super().__init__(model, sequence)
        w = self.weights
        self.norm, self.shape = w["norm.weight"], model.norm.normalized_shape
        self.gate, self.up, self.down = w["gate.weight"], w["up.weight"], w["down.weight"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        h = self.enter(F.rms_norm(x, self.shape, self.norm, 1e-6))
        h = F.silu(F.linear(h, self.gate)) * F.linear(h, self.up)
        return self.end(x + self.leave(F.linear(h, self.down)))


class Block(Handwritten):
    def __init__(self, model: nn.Module, sequence: bool) -> None:
        super().__init__(model, sequence)
        w = self.weights
        self.head, self.cos, self.sin = model.attention.head, model.cos, model.sin
        self.shape, self.norm, self.mlp_norm = model.norm.normalized_shape, w["norm.weight"], w["mlp.norm.weight"]
        self.q, self.k, self.v, self.o = (w[f"attention.{name}.weight"] for name in "qkvo")
        self.gate, self.up, self.down = (w[f"mlp.{name}.weight"] for name in ("gate", "up", "down"))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        h = self.enter(F.rms_norm(x, self.shape, self.norm, 1e-6))
        shape = (*h.shape[:-1], -1, self.head)
        q = rotate(F.linear(h, self.q).view(shape).transpose(1, 2), self.cos, self.sin)
        k = rotate(F.linear(h, self.k).view(shape).transpose(1, 2), self.cos, self.sin)
        v = F.linear(h, self.v).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.leave(F.linear(y.transpose(1, 2).flatten(2), self.o))
        h = self.enter(F.rms_norm(x, self.shape, self.mlp_norm, 1e-6))
        h = F.silu(F.linear(h, self.gate)) * F.linear(h, self.up)
        return self.end(x + self.leave(F.linear(h, self.down)))


def llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm of transformers' Llama, in its own operators."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaLayer:
    """One layer's weights."""

    def __init__(self, w: dict[str, nn.Parameter], at: str) -> None:
        self.norm, self.mlp_norm = w[f"{at}.input_layernorm.weight"], w[f"{at}.post_attention_layernorm.weight"]
        self.q, self.k, self.v, self.o = (w[f"{at}.self_attn.{name}_proj.weight"] for name in "qkvo")
        self.gate, self.up, self.down = (w[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))


class Llama(Handwritten):
    """Embedding and head are split over the vocabulary, as Megatron does; the logits are gathered."""

    def __init__(self, model: nn.Module, sequence: bool) -> None:
        super().__init__(model, sequence)
        w, config = self.weights, model.config
        self.head = head_dim(config.hidden_size)
        self.frequencies = model.model.rotary_emb.inv_freq
        self.embedding, self.norm, self.out = (
            w["model.embed_tokens.weight"],
            w["model.norm.weight"],
            w["lm_head.weight"],
        )
        self.first = self.rank * self.embedding.shape[0]
        self.layers = [LlamaLayer(w, f"model.layers.{i}") for i in range(config.num_hidden_layers)]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.first
        foreign = (local < 0) | (local >= self.embedding.shape[0])
        x = F.embedding(local.masked_fill(foreign, 0), self.embedding).masked_fill(foreign.unsqueeze(-1), 0)
        x = self.leave(x)
        angles = torch.arange(ids.shape[1]).unsqueeze(1).float() * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = self.layer(x, layer, cos, sin)
        x = self.enter(llama_norm(x, self.norm))
        return Gather.apply(F.linear(x, self.out), 2, False)

    def layer(self, x: torch.Tensor, w: LlamaLayer, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.enter(llama_norm(x, w.norm))
        shape = (*h.shape[:-1], -1, self.head)
        q = rotate(F.linear(h, w.q).view(shape).transpose(1, 2), cos, sin)
        k = rotate(F.linear(h, w.k).view(shape).transpose(1, 2), cos, sin)
        v = F.linear(h, w.v).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.leave(F.linear(y.transpose(1, 2).flatten(2), w.o))
        h = self.enter(llama_norm(x, w.mlp_norm))
        h = F.silu(F.linear(h, w.gate)) * F.linear(h, w.up)
        return x + self.leave(F.linear(h, w.down))


HANDWRITTEN = {"mlp": MLP, "swiglu": SwiGLU, "block": Block, "llama": Llama}
