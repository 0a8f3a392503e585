"""Tiny models of ``transformers`` with random weights, and inputs for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

transformers = pytest.importorskip("transformers")

Built = tuple[nn.Module, dict[str, Any]]
BATCH, LENGTH, VOCABULARY = 4, 16, 128
DROPOUT = 0.1


def ids(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    """A mask with rows of different lengths, padded on the right; one row is full."""
    lengths = torch.tensor([length - 3 * i % length for i in range(batch)])
    return (torch.arange(length)[None] < lengths[:, None]).long()


def images(height: int = 24, width: int = 40, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def llama(**changes: Any) -> Built:
    """Grouped-query attention: 8 query heads on 4 key heads."""
    config = transformers.LlamaConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
        "attention_dropout": DROPOUT, **changes,
    })  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": ids()}


def gpt2(**changes: Any) -> Built:
    config = transformers.GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **changes}
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids()}


def mixtral(**changes: Any) -> Built:
    """4 experts, of which each token goes to 2."""
    config = transformers.MixtralConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2, **changes,
    })  # fmt: skip
    return transformers.MixtralForCausalLM(config), {"input_ids": ids()}


def bert(**changes: Any) -> Built:
    config = transformers.BertConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64, **changes,
    })  # fmt: skip
    return transformers.BertForMaskedLM(config), {"input_ids": ids(), "attention_mask": padding()}


def vit(**changes: Any) -> Built:
    """15 patches and a class token, so that a sequence of 16 divides."""
    config = transformers.ViTConfig(**{
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "image_size": (24, 40), "patch_size": 8, "hidden_dropout_prob": DROPOUT,
        "attention_probs_dropout_prob": DROPOUT, **changes,
    })  # fmt: skip
    return transformers.ViTForImageClassification(config), {"pixel_values": images(*config.image_size)}


def t5(**changes: Any) -> Built:
    config = transformers.T5Config(**{
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, **changes,
    })  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": ids(), "attention_mask": padding(), "decoder_input_ids": ids(length=8, seed=2),
    }  # fmt: skip


MODELS: dict[str, Callable[..., Built]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "t5": t5}


@functools.cache
def _built(name: str, dtype: torch.dtype, training: bool, changes: tuple[tuple[str, Any], ...]) -> Built:
    torch.manual_seed(0)
    model, inputs = MODELS[name](**dict(changes))
    return model.to(dtype).train(training), inputs


def build(name: str, dtype: torch.dtype = torch.float64, training: bool = False, **changes: Any) -> Built:
    """A model and its inputs, the same at every call; what floats is of ``dtype``."""
    model, inputs = _built(name, dtype, training, tuple(changes.items()))
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in copy.deepcopy(inputs).items()}


def sized(name: str, batch: int, length: int) -> dict[str, Any]:
    """Inputs of other sizes; of images, only the batch."""
    _, inputs = build(name)
    if name == "vit":
        return {"pixel_values": inputs["pixel_values"].repeat(batch, 1, 1, 1)[:batch]}
    made = {"input_ids": ids(batch, length), "attention_mask": padding(batch, length)}
    made["decoder_input_ids"] = ids(batch, max(2, length - 4), seed=2)
    return {key: made[key] for key in inputs}


def dynamic(name: str) -> dict[str, Any]:
    """Which sizes may change: batch and length, of all inputs alike."""
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=64)
    if name == "vit":
        return {"pixel_values": {0: batch}}
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    shapes["decoder_input_ids"] = {0: batch, 1: Dim("target", min=2, max=64)}
    return {key: value for key, value in shapes.items() if key in build(name)[1]}


def labels_for(name: str, inputs: dict[str, Any]) -> torch.Tensor:
    """Labels, some of them ignored, as the model's loss takes them."""
    if name == "vit":
        return torch.arange(BATCH) % 2
    wanted = inputs["decoder_input_ids" if name == "t5" else "input_ids"].clone()
    wanted[:, :3] = -100
    wanted[1, :] = -100
    return wanted
