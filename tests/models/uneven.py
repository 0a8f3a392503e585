"""Models and inputs whose sizes no number of ranks divides, for simulated and for real ranks.

A word list of 1,003, batches of 5 and sequences of 17; heads, key heads, batches and sequences that are fewer than
the ranks, so that some ranks hold nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.models.zoo import Built, build, images, padding
from tests.presets import presets

WORDS = 1003

PLANS = presets("tp4", "sp4", "dp4", "dp2_tp2", "tp2_dp2", "dp2_sp2", "dp2_tp3", "dp2_sp3")


@dataclass(frozen=True)
class Case:
    """A model, what is changed of it, and the sizes of its inputs."""

    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    batch: int = 5
    length: int = 17


def _llama(heads: int, key_heads: int, **sizes: int) -> Case:
    changes = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "hidden_size": 48, "vocab_size": WORDS}
    return Case("llama", changes, **sizes)


CASES: dict[str, Case] = {
    "llama": _llama(6, 3),
    "llama_odd_mlp": Case("llama", {**_llama(6, 3).changes, "intermediate_size": 65}),
    "llama_1_key_head": _llama(6, 1),
    "llama_2_key_heads": _llama(6, 2),
    "llama_3_heads": _llama(3, 3),
    "llama_2_heads": _llama(2, 1),
    "llama_1_head": _llama(1, 1),
    "llama_few_rows": _llama(6, 3, batch=3, length=3),
    "llama_one_row": _llama(6, 3, batch=1, length=2),
    "gpt2": Case("gpt2", {
        "n_embd": 48, "n_head": 6, "n_inner": 65, "vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "gpt2_3_heads": Case("gpt2", {
        "n_embd": 48, "n_head": 3, "n_inner": 65, "vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "bert": Case("bert", {
        "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 65, "vocab_size": WORDS,
    }),
    "vit": Case("vit", {
        "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 65, "image_size": (32, 32),
    }),
    "t5": Case("t5", {"num_heads": 6, "d_ff": 65, "vocab_size": WORDS}),
}  # fmt: skip


def words(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Ids from the whole word list: every rank's part of the table is looked up."""
    return torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def build_case(name: str, dtype: torch.dtype = torch.float64, training: bool = False) -> Built:
    """The model of a case, and inputs of its sizes."""
    case = CASES[name]
    model, inputs = build(case.model, dtype, training, **case.changes)
    made = {
        "input_ids": words(case.batch, case.length),
        "attention_mask": padding(case.batch, case.length),
        "decoder_input_ids": words(case.batch, 7, seed=2),
    }
    if "pixel_values" in inputs:
        made["pixel_values"] = images(*case.changes["image_size"], case.batch).to(dtype)
    return model, {key: made[key] for key in inputs}
