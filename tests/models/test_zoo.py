"""Architectures that fxshard was not built on: right under every preset, or one clear error.

    python -m tests.models.test_zoo [name ...]      prints a table of all of them

A tiny random model each, in float64: outputs and all gradients against the original.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import nn

import fxshard
from fxshard import Plan, data_parallel, sequence_parallel, tensor_parallel
from fxshard.errors import CaptureError, FxshardError
from tests.helpers import Result, problems_of, run_original, run_simulated, tensors_of
from tests.models.zoo import Built, ids, images, padding, transformers

PLANS: dict[str, Plan] = {
    "tp2": tensor_parallel(2),
    "sp2": sequence_parallel(2),
    "dp2": data_parallel(2),
    "dp2_tp2": data_parallel(2) | tensor_parallel(2),
}
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
OLDER = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip


def text() -> dict[str, Any]:
    return {"input_ids": ids()}


def masked_text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padding()}


def pair() -> dict[str, Any]:
    return {**masked_text(), "decoder_input_ids": ids(length=8, seed=2)}


def picture() -> dict[str, Any]:
    return {"pixel_values": images(24, 24)}


def speech() -> dict[str, Any]:
    return {
        "input_features": torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1)),
        "decoder_input_ids": ids(length=8, seed=2),
    }


def text_and_picture() -> dict[str, Any]:
    return {**masked_text(), "pixel_values": images(24, 24)}


@dataclass(frozen=True)
class Entry:
    """How to build a model: the class, its configuration, and inputs for it."""

    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = text
    training: bool = False
    cache: bool = False
    dtype: torch.dtype = torch.float64


ZOO: dict[str, Entry] = {
    "mistral": Entry("MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
    "qwen2": Entry("Qwen2ForCausalLM", GROUPED),
    "qwen3": Entry("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi3": Entry("Phi3ForCausalLM", GROUPED),
    "phi": Entry("PhiForCausalLM", SIZES),
    "gemma": Entry("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": Entry("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "stablelm": Entry("StableLmForCausalLM", GROUPED),
    "cohere": Entry("CohereForCausalLM", GROUPED),
    "olmo2": Entry("Olmo2ForCausalLM", GROUPED),
    "granite": Entry("GraniteForCausalLM", GROUPED),
    "starcoder2": Entry("Starcoder2ForCausalLM", GROUPED),
    "gpt_neox": Entry("GPTNeoXForCausalLM", SIZES),
    "gptj": Entry("GPTJForCausalLM", {**OLDER, "rotary_dim": 4, "n_positions": 64}),
    "codegen": Entry("CodeGenForCausalLM", {**OLDER, "rotary_dim": 4, "n_positions": 64}),
    "gpt_bigcode": Entry("GPTBigCodeForCausalLM", {**OLDER, "n_positions": 64}),
    "bloom": Entry("BloomForCausalLM", {**OLDER, "hidden_size": 32}),
    "falcon": Entry("FalconForCausalLM", {**SIZES, "multi_query": True, "new_decoder_architecture": False}),
    "mpt": Entry("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "max_seq_len": 64}),
    "opt": Entry("OPTForCausalLM", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, masked_text),
    "mixtral": Entry("MixtralForCausalLM", EXPERTS, dtype=torch.float32),
    "qwen2_moe": Entry(
        "Qwen2MoeForCausalLM",
        {
            **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        dtype=torch.float32,
    ),
    "gpt_oss": Entry("GptOssForCausalLM", {**EXPERTS, "head_dim": 8, "sliding_window": 8}, dtype=torch.float32),
    "mamba": Entry("MambaForCausalLM", {**SIZES, "state_size": 4, "conv_kernel": 4, "time_step_rank": 4}),
    "albert": Entry("AlbertForMaskedLM", {**SIZES, "embedding_size": 16}, masked_text),
    "distilbert": Entry(
        "DistilBertForMaskedLM",
        {"vocab_size": 128, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        masked_text,
    ),
    "roberta": Entry("RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 80}, masked_text),
    "electra": Entry("ElectraForMaskedLM", {**SIZES, "embedding_size": 16}, masked_text),
    "deberta_v2": Entry(
        "DebertaV2ForMaskedLM", {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, masked_text
    ),
    "mpnet": Entry("MPNetForMaskedLM", {**SIZES, "max_position_embeddings": 80}, masked_text),
    "bert_classifier": Entry("BertForSequenceClassification", {**SIZES, "num_labels": 3}, masked_text),
    "bart": Entry("BartForConditionalGeneration", BART, pair),
    "mbart": Entry("MBartForConditionalGeneration", BART, pair),
    "pegasus": Entry("PegasusForConditionalGeneration", BART, pair),
    "mt5": Entry(
        "MT5ForConditionalGeneration",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
        pair,
    ),
    "whisper": Entry(
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "suppress_tokens": None,
         "begin_suppress_tokens": None},
        speech,
    ),
    "clip": Entry(
        "CLIPModel", {"text_config": {**SIZES, "projection_dim": 16}, "vision_config": VISION, "projection_dim": 16},
        text_and_picture,
    ),
    "siglip": Entry("SiglipModel", {"text_config": SIZES, "vision_config": VISION}, text_and_picture),
    "deit": Entry("DeiTForImageClassification", VISION, picture),
    "beit": Entry(
        "BeitForImageClassification",
        {**VISION, "use_relative_position_bias": True, "use_absolute_position_embeddings": False},
        picture,
    ),
    "dinov2": Entry("Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}, picture),
    "swin": Entry(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        lambda: {"pixel_values": images(32, 32)},
    ),
    "convnext": Entry(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        lambda: {"pixel_values": images(32, 32)},
    ),
    "resnet": Entry(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        lambda: {"pixel_values": images(32, 32)},
    ),
    "resnet_trained": Entry(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        lambda: {"pixel_values": images(32, 32)},
        training=True,
    ),
    "wav2vec2": Entry(
        "Wav2Vec2ForCTC",
        {**SIZES, "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        lambda: {"input_values": torch.randn(4, 256, generator=torch.Generator().manual_seed(1))},
    ),
    "segformer": Entry(
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2,
         "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
        lambda: {"pixel_values": images(32, 32)},
    ),
    "gpt2_trained": Entry("GPT2LMHeadModel", {**OLDER, "n_positions": 64}, training=True),
    "bert_trained": Entry("BertForMaskedLM", SIZES, masked_text, training=True),
    "albert_trained": Entry(
        "AlbertForMaskedLM", {**SIZES, "embedding_size": 16, "hidden_dropout_prob": 0.1}, masked_text, training=True
    ),
    "qwen2_cached": Entry("Qwen2ForCausalLM", GROUPED, cache=True),
    "mixtral_trained": Entry(
        "MixtralForCausalLM", {**EXPERTS, "output_router_logits": True}, training=True, dtype=torch.float32
    ),
}  # fmt: skip

REFUSED: dict[str, str] = {}
"""Models that cannot be captured faithfully: what the error says."""

IN_FLOAT32 = {"gemma", "gemma2", "cohere", "mamba"}
"""Models that compute a part in float32, whatever their weights are."""

FAST = ("phi3", "gpt_neox", "bloom", "mixtral", "resnet_trained", "bart")


@functools.lru_cache(maxsize=4)
def built(name: str) -> tuple[Built, Result]:
    entry = ZOO[name]
    torch.manual_seed(0)
    cls = getattr(transformers, entry.model)
    config = cls.config_class(**entry.config)
    model: nn.Module = cls(config).to(entry.dtype).train(entry.training)
    with torch.no_grad():  # so that no weight is 0 or 1, and no bias is missed
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    inputs = {k: v.to(entry.dtype) if v.is_floating_point() else v for k, v in entry.inputs().items()}
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = entry.cache
    return (model, inputs), run_original(model, (), inputs, loss=loss_of)


def loss_of(output: Any) -> torch.Tensor:
    """Over all outputs but router statistics and the like, which are no functions that gradients flow through."""
    terms = []
    for index, (_, tensor) in enumerate(tensors_of(output)):
        if tensor.requires_grad:
            weights = torch.linspace(-1 - index, 1, tensor.numel(), dtype=tensor.dtype).cos().reshape(tensor.shape)
            terms.append((tensor * weights).sum())
    return torch.stack(terms).sum()


def differences(name: str, plan: str) -> tuple[fxshard.ParallelModule, list[str]]:
    (model, inputs), expected = built(name)
    program = fxshard.parallelize(model, PLANS[plan], (), inputs)
    return program, problems_of(run_simulated(program, (), inputs, loss=loss_of), expected, tolerances(name))


def tolerances(name: str) -> tuple[float, float]:
    if ZOO[name].dtype == torch.float32:
        return 1e-4, 1e-3
    return (1e-6, 1e-6) if name in IN_FLOAT32 else (1e-9, 1e-9)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        (name, plan) if name in FAST and plan == "dp2_tp2" else pytest.param(name, plan, marks=pytest.mark.slow)
        for name in ZOO
        for plan in PLANS
    ],
)
def test_an_unseen_model(name: str, plan: str) -> None:
    if name in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[name]) as caught:
            differences(name, plan)
        assert caught.value.fix
        return
    program, problems = differences(name, plan)
    assert not problems, "\n".join([f"differs from the original under {program.plan}", *problems[:20]])


def report(names: list[str]) -> None:
    """Prints what became of every model under every plan."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in names:
        for plan in PLANS:
            start = time.perf_counter()
            kinds = weights = ""
            try:
                program, problems = differences(name, plan)
                verdict = f"WRONG: {problems[0]}" if problems else "right"
                counts = Counter(f"{c.phase[0]}:{c.kind}" for c in program.collectives())
                kinds = " ".join(f"{k} {n}" for k, n in sorted(counts.items()))
                local = sum(p.numel() for p in program.parameters())
                weights = f"{local / sum(p.numel() for p in program._model[0].parameters()):.0%}"
                without_rule = sorted({str(f).split(" has no rule")[0] for f in program.fallbacks()})
            except FxshardError as error:
                verdict, without_rule = f"{type(error).__name__}: {error.what[:100]}", []
            except Exception as error:
                verdict, without_rule = f"CRASH {type(error).__name__}: {str(error)[:160]}", []
            took = f"{time.perf_counter() - start:.1f}"
            rows.append((name, plan, verdict, weights, kinds, " ".join(without_rule)[:60], took))
            print(*rows[-1], sep=" | ", flush=True)
    print(tabulate(rows, headers=("model", "plan", "verdict", "local weights", "collectives", "no rule", "s")))


if __name__ == "__main__":
    report(sys.argv[1:] or list(ZOO))
