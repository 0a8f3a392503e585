"""What is measured: small models, written as their users write them, that know nothing of ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, SEQUENCE, VOCABULARY = 2, 64, 1024


class MLP(nn.Module):
    """A residual MLP, as in GPT-2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class SwiGLU(nn.Module):
    """A residual gated MLP, as in Llama."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, 1e-6)
        self.gate, self.up = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, 3 * dim, bias=False)
        self.down = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def head_dim(dim: int) -> int:
    """The size of an attention head."""
    return min(64, dim // 4)


def angles(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions: ``[sequence, head]``."""
    frequencies = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    at = torch.outer(torch.arange(SEQUENCE), frequencies).repeat(1, 2)
    return at.cos(), at.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of ``x: [batch, head, sequence, feature]``."""
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-right, left), -1) * sin


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = head_dim(dim)
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k, self.v = nn.Linear(dim, dim // 2, bias=False), nn.Linear(dim, dim // 2, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.head)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer of Llama."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.RMSNorm(dim, 1e-6), Attention(dim), SwiGLU(dim)
        cos, sin = angles(head_dim(dim))
        self.cos, self.sin = nn.Buffer(cos), nn.Buffer(sin)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.attention(self.norm(x), self.cos, self.sin))


def llama(dim: int, layers: int = 2) -> nn.Module:
    """A Llama of transformers, with random weights."""
    heads = dim // head_dim(dim)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


MODELS = {"mlp": MLP, "swiglu": SwiGLU, "block": Block, "llama": llama}


def build(name: str, dim: int) -> tuple[nn.Module, torch.Tensor]:
    """A model and an input for it, the same on all ranks."""
    torch.manual_seed(0)
    model = MODELS[name](dim)
    if name == "llama":
        return model, torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    return model, torch.randn(BATCH, SEQUENCE, dim)
