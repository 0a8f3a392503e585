"""What a rank computes and communicates on 1, 2, 4 and 8 ranks, counted: ``python -m benchmarks.scaling``.

A Llama on the meta device, one training step, the loss a sum of all logits, which come back whole. Beside each count
stands whether it is what the papers say: Megatron-LM (Shoeybi et al., 2019; Korthikanti et al., 2022) for
``tensor_parallel`` and ``sequence_parallel``, ZeRO (Rajbhandari et al., 2020) for ``zero``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from tabulate import tabulate

import fxshard

ITEM = 4
"""Bytes of a float32."""
PRESETS: Mapping[str, Callable[[int], fxshard.Plan]] = {
    "tensor_parallel": fxshard.tensor_parallel,
    "sequence_parallel": fxshard.sequence_parallel,
    "data_parallel": fxshard.data_parallel,
    "zero": fxshard.zero,
}


class Sizes(NamedTuple):
    """The sizes of a Llama and its batch."""

    batch: int = 8
    sequence: int = 2048
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_heads: int = 8
    layers: int = 32
    vocabulary: int = 128256

    @property
    def keys(self) -> int:
        """The features of all keys."""
        return self.key_heads * self.hidden // self.heads

    @property
    def matrices(self) -> int:
        """The elements of all weights but those of norms; table and head are two."""
        layer = 2 * self.hidden * (self.hidden + self.keys) + 3 * self.hidden * self.intermediate
        return self.layers * layer + 2 * self.vocabulary * self.hidden

    @property
    def norms(self) -> int:
        """The elements of the weights of norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def forward_flops(self) -> int:
        """Of the whole model: two for each weight of a product and token, and attention over all pairs of positions."""
        tokens = self.batch * self.sequence
        weights = self.matrices - self.vocabulary * self.hidden  # the table is looked up
        return 2 * tokens * weights + self.layers * 4 * tokens * self.sequence * self.hidden

    @property
    def stream(self) -> int:
        """The bytes of the residual stream."""
        return self.batch * self.sequence * self.hidden * ITEM

    @property
    def logits(self) -> int:
        """The bytes of the logits."""
        return self.batch * self.sequence * self.vocabulary * ITEM


Payload = dict[tuple[str, str], int]
"""(phase, kind) -> bytes of the full-size tensors."""


def tensor_parallel(sizes: Sizes) -> Payload:
    """Two all-reduces a layer each way, and one for the vocabulary's table and one for the head's input."""
    streams = (2 * sizes.layers + 1) * sizes.stream
    return {
        ("forward", "all_reduce"): streams,
        ("forward", "all_gather"): sizes.logits,
        ("backward", "all_reduce"): streams,
    }


def sequence_parallel(sizes: Sizes) -> Payload:
    """Each all-reduce is a reduce-scatter and an all-gather; the gradients of the norms' weights are summed."""
    streams = (2 * sizes.layers + 1) * sizes.stream
    return {
        ("forward", "reduce_scatter"): streams,
        ("forward", "all_gather"): streams + sizes.logits,
        ("backward", "reduce_scatter"): streams,
        ("backward", "all_gather"): streams,
        ("backward", "all_reduce"): sizes.norms * ITEM,
    }


def data_parallel(sizes: Sizes) -> Payload:
    """The gradients of all weights are summed."""
    return {
        ("forward", "all_gather"): sizes.logits,
        ("backward", "all_reduce"): (sizes.matrices + sizes.norms) * ITEM,
    }


def zero(sizes: Sizes, whole: int) -> Payload:
    """Weights are gathered in both passes, the table in one; their gradients are reduce-scattered.

    ``whole``: the elements of the weights so small that every rank keeps them; their gradients are summed.
    """
    parts = sizes.matrices + sizes.norms - whole
    return {
        ("forward", "all_gather"): parts * ITEM + sizes.logits,
        ("backward", "all_gather"): (parts - sizes.vocabulary * sizes.hidden) * ITEM,
        ("backward", "reduce_scatter"): parts * ITEM,
        ("backward", "all_reduce"): whole * ITEM,
    }


def expected(preset: str, sizes: Sizes, ranks: int, whole: int) -> Payload:
    """What the closed form of a preset says."""
    if ranks == 1:
        return {}
    if preset == "zero":
        return zero(sizes, whole)
    forms = {f.__name__: f for f in (tensor_parallel, sequence_parallel, data_parallel)}
    return forms[preset](sizes)


def build(sizes: Sizes) -> transformers.LlamaForCausalLM:
    """The model, without weights."""
    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        num_hidden_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


def counted(model: Any, sizes: Sizes, preset: str, ranks: int) -> tuple[fxshard.Counts, int]:
    """What the first rank does in one step, and the elements of the weights that every rank has whole."""
    ids = torch.zeros(sizes.batch, sizes.sequence, dtype=torch.int64, device="meta")
    call = {"input_ids": ids, "use_cache": False}
    program = fxshard.parallelize(model, PRESETS[preset](ranks), (), call)
    cut = {name for name, placed in program.plan.params.items() if any(p.is_shard() for p in placed.values())}
    whole = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in cut)
    return fxshard.count(program, **call), whole


def payload_of(counts: fxshard.Counts) -> Payload:
    """What is communicated, by phase and kind."""
    out: Payload = {}
    for each in counts.collectives:
        key = each.phase, each.kind
        out[key] = out.get(key, 0) + each.num_bytes
    return out


def row(sizes: Sizes, preset: str, ranks: int, counts: fxshard.Counts, whole: int) -> list[str]:
    """A row of the table."""
    flops = counts.forward_flops * ranks == sizes.forward_flops and counts.backward_flops == 2 * counts.forward_flops
    moved = payload_of(counts) == expected(preset, sizes, ranks, whole)
    return [
        preset,
        str(ranks),
        f"{counts.forward_flops / 1e12:.2f}",
        f"{counts.backward_flops / 1e12:.2f}",
        f"{counts.payload(phase='forward') / 2**20:.0f}",
        f"{counts.payload(phase='backward') / 2**20:.0f}",
        f"{counts.sent() / 2**20:.0f}",
        "yes" if flops else "NO",
        "yes" if moved else "NO",
    ]


HEADERS = [
    *("plan", "ranks", "TFLOP forward", "TFLOP backward", "MiB forward", "MiB backward", "MiB sent by a rank"),
    *("FLOP as expected", "bytes as expected"),
]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args())
    ranks = options.pop("ranks")
    sizes = Sizes(**options)
    model = build(sizes)
    rows = [row(sizes, preset, n, *counted(model, sizes, preset, n)) for preset in PRESETS for n in ranks]
    print(f"one step of a Llama, a rank: {sizes}")
    print(tabulate(rows, headers=HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()
