"""The registry of ``transformers`` architectures: for each its class, what is fed to it, and how its configuration is
made tiny.

Adding an architecture is one line: the name of its class, in the call of its family. Its default configuration is
shrunk by :func:`shrunk`, which knows the names that configurations use for their sizes; :data:`SETTINGS` holds what
the shrink cannot know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.models.zoo import BATCH, LENGTH, VOCABULARY, ids, images, padding, transformers

Inputs = dict[str, Any]
EXACT = 1e-8
"""In float64: how far outputs and gradients may be off, relative to the scale of each."""
SINGLE = 1e-3
"""The same in float32."""
ISLANDS = 1e-5
"""The same for models that compute a part in float32, whatever their weights are."""


@dataclass(frozen=True)
class Entry:
    """One architecture of the zoo.

    Attributes:
        name: the name of its class; after a slash, which variant of it.
        family: decoder, encoder, encoder-decoder, MoE, state-space, vision, audio or multimodal.
        build: makes the model, with random weights, in float32 and evaluation mode.
        inputs: makes what is fed to it.
        dtype: what it is run in.
        tolerance: how far outputs and gradients may be off.
        why: the reason for a dtype or a tolerance that is not the usual one.
        refused: what the error says where the model cannot be captured faithfully.
        refused_in_training: the same in training mode, where that is another.
        least: of the matrices of attention and MLP, or of all parameters, what share tensor parallelism splits.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    dtype: torch.dtype = torch.float64
    tolerance: float = EXACT
    why: str = ""
    refused: str = ""
    refused_in_training: str | None = None
    least: float = 0.949


# --- inputs ----------------------------------------------------------------------------------------------------------


def text() -> Inputs:
    return {"input_ids": ids()}


def cached_text() -> Inputs:
    return {**text(), "use_cache": True}


def masked_text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": padding()}


def odd_text() -> Inputs:
    return {"input_ids": small_ids(13)}


def pair() -> Inputs:
    return {**masked_text(), "decoder_input_ids": ids(length=8, seed=2)}


def full_pair() -> Inputs:
    """Without padding, for models that look whether there is any."""
    return {**text(), "decoder_input_ids": ids(length=8, seed=2)}


def odd_pair() -> Inputs:
    return {"input_ids": small_ids(13), "decoder_input_ids": small_ids(7)}


def small_ids(length: int) -> torch.Tensor:
    """For a vocabulary of 103."""
    return ids(length=length) % 103


def picture() -> Inputs:
    return {"pixel_values": images(32, 32)}


def video() -> Inputs:
    return {"pixel_values": noise(BATCH, 2, 3, 32, 32)}


def text_and_picture() -> Inputs:
    return {**masked_text(), **picture()}


def wave() -> Inputs:
    return {"input_values": noise(BATCH, 256)}


def spectrogram() -> Inputs:
    return {"input_features": noise(BATCH, 32, 16)}


def speech() -> Inputs:
    """What Whisper takes: mel frequencies before time."""
    return {"input_features": noise(BATCH, 16, 128), "decoder_input_ids": ids(length=8, seed=2)}


def spectrum() -> Inputs:
    """What the Audio Spectrogram Transformer takes."""
    return {"input_values": noise(BATCH, 32, 16)}


def late_speech() -> Inputs:
    """What Speech2Text takes: time before mel frequencies."""
    return {"input_features": noise(BATCH, 32, 16), "decoder_input_ids": ids(length=8, seed=2)}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


IMAGE_TOKEN = 5
"""What stands in a prompt for a patch of a picture."""


def prompt(patches: int) -> Callable[[], Inputs]:
    """A picture and a prompt that holds a token for each of its patches."""

    def inputs() -> Inputs:
        tokens = ids(length=patches + LENGTH)
        tokens[tokens == IMAGE_TOKEN] += 1
        tokens[:, 1 : patches + 1] = IMAGE_TOKEN
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **picture()}

    return inputs


# --- tiny configurations ---------------------------------------------------------------------------------------------

HIDDEN, INNER, HEADS, GROUPS, HEAD = 64, 128, 8, 4, 8


def _named(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, int] = {
    **_named(HIDDEN, "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim"),
    **_named(HIDDEN, "encoder_hidden_size"),
    **_named(INNER, "intermediate_size ffn_dim d_ff n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim"),
    **_named(INNER, "ffn_hidden_size dim_feedforward feed_forward_size moe_intermediate_size"),
    **_named(INNER, "shared_expert_intermediate_size"),
    **_named(INNER, "moe_shared_expert_intermediate_size intermediate_size_mlp shared_intermediate_size"),
    **_named(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"),
    **_named(HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    **_named(GROUPS, "num_key_value_heads"),
    **_named(HEAD, "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_size"),
    **_named(4, "rotary_dim laurel_rank"),
    **_named(32, "q_lora_rank kv_lora_rank projection_dim"),
    **_named(VOCABULARY, "vocab_size"),
    **_named(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok moe_k moe_topk num_experts_per_token type_vocab_size"),
    **_named(1, "n_group topk_group num_expert_group first_k_dense_replace num_hidden_groups"),
    **_named(4, "linear_num_key_heads"),
    **_named(8, "linear_num_value_heads linear_key_head_dim linear_value_head_dim"),
    **_named(64, "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len"),
    **_named(8, "state_size mamba_d_state ssm_state_size attention_window sliding_window window_size patch_size"),
    **_named(32, "image_size"),
    **_named(16, "num_mel_bins"),
    **_named(0, "pad_token_id"), **_named(1, "bos_token_id"), **_named(2, "eos_token_id decoder_start_token_id"),
}  # fmt: skip
"""The names that configurations use for sizes -> how large they are here. Four ranks divide 8 heads in 4 groups."""

DROPOUTS = ("dropout", "pdrop", "drop_path", "drop_rate")
RHYTHMS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def shrunk(config: Any) -> dict[str, Any]:
    """The settings that make a configuration tiny, for its class, those inside of it included.

    Two layers, of two kinds where a model mixes kinds; every dropout draws, and one layer in five is dropped.
    """
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            small[name] = {"model_type": value.model_type, **shrunk(value)}
        elif name in SIZES and type(value) is int:
            small[name] = SIZES[name]
        elif name in RHYTHMS and isinstance(value, list):
            small[name] = (list(dict.fromkeys(value)) + value)[:2]
        elif isinstance(value, float) and ("layerdrop" in name or "layer_drop" in name):
            small[name] = 0.2
        elif isinstance(value, float) and any(word in name for word in DROPOUTS):
            small[name] = 0.1
    return small


def merged(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` and ``more``, dicts inside of both together."""
    out = dict(settings)
    for name, value in more.items():
        inner = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = merged(out[name], value) if inner else value
    return out


def builder(model: str, settings: Mapping[str, Any], experts: str = "") -> Callable[[], nn.Module]:
    """Makes a class of transformers from its shrunken default configuration and ``settings``.

    Args:
        model: the class.
        settings: what the shrink cannot know.
        experts: how a mixture of experts computes: ``batched_mm`` or ``grouped_mm``.
    """

    def build() -> nn.Module:
        cls = getattr(transformers, model)
        config = cls.config_class(**merged(shrunk(cls.config_class()), settings))
        for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig))):
            if getattr(part, "use_cache", False):
                part.use_cache = False
            if experts:
                part._experts_implementation = experts
        return cls(config).eval()  # type: ignore[no-any-return]

    return build


# --- the registry ----------------------------------------------------------------------------------------------------

AUDIO = {
    "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
}  # fmt: skip
PICTURE_OF_16 = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
LATENT = {
    "num_key_value_heads": HEADS,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD,
    "v_head_dim": HEAD,
    "n_shared_experts": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
RECURRENT = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 8, "mamba_d_ssm": 128, "mamba_n_groups": 1}

ODD = {
    "vocab_size": 103, "hidden_size": 48, "intermediate_size": 90, "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip
"""Sizes that neither two nor four ranks divide."""

SETTINGS: dict[str, dict[str, Any]] = {
    "ASTForAudioClassification": {"max_length": 32, "frequency_stride": 8, "time_stride": 8},
    "BertForSequenceClassification": {"num_labels": 3},
    "PegasusXForConditionalGeneration": {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},  # it fails by itself
    "BambaForCausalLM": {**RECURRENT, "attn_layer_indices": [1]},
    "BeitForImageClassification": {"use_relative_position_bias": True},
    "BitForImageClassification": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
    "CvtForImageClassification": {"embed_dim": [16, 32, 32], "num_heads": [2, 4, 4], "depth": [1, 2, 3]},
    "ConvNextForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "ConvNextV2ForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "DeepseekV2ForCausalLM": {**LATENT, "num_experts_per_tok": 2},
    "DebertaV2ForMaskedLM": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    **dict.fromkeys(("DeepseekV3ForCausalLM", "MiniCPM3ForCausalLM",
        "KimiLinearForCausalLM"), LATENT),
    **dict.fromkeys(("GraniteMoeHybridForCausalLM", "FalconH1ForCausalLM"), RECURRENT),
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MinistralForCausalLM": {"head_dim": HEAD},
    "LongcatFlashForCausalLM": {**LATENT, "expert_ffn_hidden_size": INNER, "zero_expert_num": 2},
    "Dots1ForCausalLM": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER},
    "DiffLlamaForCausalLM": {"attention_dropout": 0.0},
    "FNetForMaskedLM": {"tpu_short_seq_length": 16},
    "EsmForMaskedLM": {"vocab_size": VOCABULARY, "mask_token_id": 3, "pad_token_id": 0},
    "FalconForCausalLM": {"new_decoder_architecture": False},
    "FSMTForConditionalGeneration": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["a", "b"]},
    "FocalNetForImageClassification": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "patch_size": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 16, "activation_sparsity_pattern": [0.95, 0.0]},
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0},
    "HieraForImageClassification": {
        "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "patch_size": [7, 7], "image_size": [32, 32],
        "query_stride": [2, 2], "masked_unit_size": [4, 4], "num_query_pool": 1,
    },
    "HunYuanDenseV1ForCausalLM": {"rope_parameters": ROPE, "head_dim": HEAD},
    "HunYuanMoEV1ForCausalLM": {"rope_parameters": ROPE, "head_dim": HEAD},
    "JambaForCausalLM": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_dt_rank": 4,
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "MambaForCausalLM": {"time_step_rank": 4},
    "FalconMambaForCausalLM": {"time_step_rank": 4},
    "MoonshineForConditionalGeneration": {"encoder_num_attention_heads": 8, "decoder_num_attention_heads": 8,
        "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
    "NemotronHForCausalLM": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "NemotronForCausalLM": {"head_dim": HEAD, "num_key_value_heads": GROUPS},
    "PoolFormerForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2,
        "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
    "PvtForImageClassification": {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [2, 4, 4, 4]},
    "PvtV2ForImageClassification": {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [2, 4, 4, 4]},
    "RegNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
        "groups_width": 8},
    "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
        "layer_type": "basic"},
    "SegformerForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4],
        "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
    "SegformerForSemanticSegmentation": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4],
        "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 32},
    "SwinForImageClassification": {"embed_dim": 32, "depths": [1, 1], "num_heads": [4, 8], "window_size": 4,
        "patch_size": 4},
    "Swinv2ForImageClassification": {"embed_dim": 32, "depths": [1, 1], "num_heads": [4, 8], "window_size": 4,
        "patch_size": 4},
    "Speech2TextForConditionalGeneration": {"input_feat_per_channel": 16, "conv_channels": 32},
    "TimesformerForVideoClassification": {"num_frames": 2},
    "VideoMAEForVideoClassification": {"num_frames": 2},
    "VivitForVideoClassification": {"num_frames": 2, "tubelet_size": [1, 8, 8]},
    "ViTMAEModel": {"mask_ratio": 0.0},
    "Wav2Vec2BertForCTC": {"vocab_size": VOCABULARY, "feature_projection_input_dim": 16,
        "apply_spec_augment": False},
    "XGLMForCausalLM": {"attention_heads": 8},
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 8,
        "mamba_ngroups": 1, "chunk_size": 8},
    **dict.fromkeys(("HubertForCTC", "SEWForCTC", "SEWDForCTC", "UniSpeechForCTC", "UniSpeechSatForCTC",
        "Wav2Vec2ForCTC", "WavLMForCTC", "Data2VecAudioForCTC"), AUDIO),
    "Wav2Vec2ConformerForCTC": {**AUDIO, "vocab_size": VOCABULARY},
    "LlavaForConditionalGeneration": {**PICTURE_OF_16},
    "PaliGemmaForConditionalGeneration": {**PICTURE_OF_16},
    "VipLlavaForConditionalGeneration": {**PICTURE_OF_16, "vision_feature_layers": [-1, -2]},
    "AyaVisionForConditionalGeneration": {**PICTURE_OF_16},
    "GotOcr2ForConditionalGeneration": {**PICTURE_OF_16},
    "InternVLForConditionalGeneration": {
        **PICTURE_OF_16, "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    "Gemma3ForConditionalGeneration": {**PICTURE_OF_16, "mm_tokens_per_image": 4},
}  # fmt: skip
"""What the shrink cannot know: lists of sizes, which tokens stand for pictures, choices of kinds of layers."""


def entries(family: str, inputs: Callable[[], Inputs], names: str, experts: str = "", **common: Any) -> list[Entry]:
    """An entry for each class that is named; of a mixture of experts, how it computes stands after a slash."""
    suffix = f"/{experts}" if experts else ""
    return [
        Entry(name + suffix, family, builder(name, SETTINGS.get(name, {}), experts), inputs, **common)
        for name in names.split()
    ]


def variant(
    model: str, label: str, family: str, inputs: Callable[[], Inputs], experts: str = "",
    refused_in_training: str | None = None, **settings: Any,
) -> Entry:  # fmt: skip
    """A class of the zoo with other settings."""
    build = builder(model, merged(SETTINGS.get(model, {}), settings), experts)
    return Entry(f"{model}/{label}", family, build, inputs, refused_in_training=refused_in_training)


MIXTURES = """
    AfmoeForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Dots1ForCausalLM Ernie4_5_MoeForCausalLM
    FlexOlmoForCausalLM Glm4MoeForCausalLM GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM
    HunYuanMoEV1ForCausalLM Lfm2MoeForCausalLM MiniMaxM2ForCausalLM MixtralForCausalLM OlmoeForCausalLM
    PhimoeForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM
"""
GROUPED = "AfmoeForCausalLM DeepseekV3ForCausalLM GptOssForCausalLM MixtralForCausalLM Qwen2MoeForCausalLM"
MIXED = "GraniteMoeHybridForCausalLM JambaForCausalLM MiniMaxForCausalLM NemotronHForCausalLM"
IN_SINGLE: dict[str, Any] = {"dtype": torch.float32, "tolerance": SINGLE}
TRACED = "rounds differently while it is traced, in a part that it computes in float32"
REWRITTEN = "weights that forward writes to are not split"
GUARD = "Could not guard on data-dependent expression"
OVERFLOW = "its mask is made of the least number of its weights' dtype, and overflows"

ZOO: dict[str, Entry] = {entry.name: entry for entry in (
    *entries("decoder", text, """
        ApertusForCausalLM ArceeForCausalLM BioGptForCausalLM BitNetForCausalLM CodeGenForCausalLM CohereForCausalLM
        Cohere2ForCausalLM CTRLLMHeadModel DiffLlamaForCausalLM DogeForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM
        FalconForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma4ForCausalLM GlmForCausalLM
        Glm4ForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM GPTJForCausalLM
        GraniteForCausalLM HeliumForCausalLM HunYuanDenseV1ForCausalLM LlamaForCausalLM MiniCPM3ForCausalLM
        MinistralForCausalLM MistralForCausalLM ModernBertDecoderForCausalLM MptForCausalLM NanoChatForCausalLM
        NemotronForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OpenAIGPTLMHeadModel PersimmonForCausalLM
        PhiForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
        StableLmForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM XLNetLMHeadModel BloomForCausalLM
    """),
    *entries("decoder", masked_text, "OPTForCausalLM"),
    *entries("decoder", text, "XGLMForCausalLM", **IN_SINGLE, why=OVERFLOW),
    *entries("MoE", text, GROUPED, "grouped_mm", **IN_SINGLE, why="grouped_mm takes no float64"),
    *entries("MoE", text, MIXTURES, "batched_mm"),
    *entries("MoE", text, "JetMoeForCausalLM Llama4ForCausalLM"),
    *entries("MoE", text, "LongcatFlashForCausalLM", refused=GUARD),
    *entries("state-space", text, """
        BambaForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM Lfm2ForCausalLM MambaForCausalLM Mamba2ForCausalLM
        RecurrentGemmaForCausalLM xLSTMForCausalLM Zamba2ForCausalLM
    """),
    *entries("state-space", text, "RwkvForCausalLM", least=0.66, why=REWRITTEN),
    *entries("state-space", text, MIXED, "batched_mm"),
    *entries("state-space", text, "OlmoHybridForCausalLM Qwen3_5ForCausalLM", **IN_SINGLE, why=TRACED),
    *entries("state-space", text, "Qwen3NextForCausalLM", "grouped_mm", **IN_SINGLE, why=TRACED),
    *entries("encoder", masked_text, """
        AlbertForMaskedLM BertForMaskedLM BertForSequenceClassification BigBirdForMaskedLM CamembertForMaskedLM
        ConvBertForMaskedLM Data2VecTextForMaskedLM DebertaForMaskedLM
        DebertaV2ForMaskedLM DistilBertForMaskedLM DPRQuestionEncoder ElectraForMaskedLM ErnieForMaskedLM EsmForMaskedLM
        EuroBertForMaskedLM FlaubertWithLMHeadModel FunnelForMaskedLM GteForMaskedLM
        JinaEmbeddingsV3ForMaskedLM LayoutLMForMaskedLM MegatronBertForMaskedLM
        MobileBertForMaskedLM ModernBertForMaskedLM MPNetForMaskedLM NomicBertForMaskedLM NystromformerForMaskedLM
        RemBertForMaskedLM RobertaForMaskedLM RobertaPreLayerNormForMaskedLM RoCBertForMaskedLM RoFormerForMaskedLM
        SqueezeBertForMaskedLM TapasForMaskedLM XLMWithLMHeadModel XLMRobertaForMaskedLM
        XLMRobertaXLForMaskedLM XmodForMaskedLM
    """),
    *entries("encoder", text, "FNetForMaskedLM"),
    *entries("encoder", text, "CanineForSequenceClassification SplinterForQuestionAnswering",
             **IN_SINGLE, why=OVERFLOW),
    *entries("encoder", masked_text, "LongformerForMaskedLM", **IN_SINGLE, why=OVERFLOW),
    *entries("encoder", masked_text, "IBertForMaskedLM", refused_in_training="NaN detected"),
    *entries("encoder", masked_text, "YosoForMaskedLM", refused="is a custom autograd.Function; it is given a dict"),
    *entries("encoder-decoder", pair, """
        BartForConditionalGeneration BigBirdPegasusForConditionalGeneration BlenderbotForConditionalGeneration
        BlenderbotSmallForConditionalGeneration
        LongT5ForConditionalGeneration M2M100ForConditionalGeneration MarianMTModel MBartForConditionalGeneration
        MT5ForConditionalGeneration MvpForConditionalGeneration NllbMoeForConditionalGeneration
        PegasusForConditionalGeneration PegasusXForConditionalGeneration PLBartForConditionalGeneration
        SwitchTransformersForConditionalGeneration T5ForConditionalGeneration UMT5ForConditionalGeneration
    """),
    *entries("encoder-decoder", pair, "ProphetNetForConditionalGeneration T5GemmaForConditionalGeneration",
             **IN_SINGLE, why=OVERFLOW),
    *entries("encoder-decoder", full_pair, "FSMTForConditionalGeneration", **IN_SINGLE, why=OVERFLOW,
             refused_in_training="what follows depends on it"),
    *entries("encoder-decoder", pair, "LEDForConditionalGeneration", **IN_SINGLE, why=OVERFLOW),
    *entries("vision", picture, """
        BeitForImageClassification BitForImageClassification CLIPVisionModel ConvNextForImageClassification
        ConvNextV2ForImageClassification CvtForImageClassification Data2VecVisionForImageClassification
        DeiTForImageClassification Dinov2ForImageClassification Dinov2WithRegistersForImageClassification DINOv3ViTModel
        FocalNetForImageClassification GLPNForDepthEstimation HieraForImageClassification IJepaForImageClassification
        MobileNetV2ForImageClassification MobileViTForImageClassification PoolFormerForImageClassification
        PvtForImageClassification PvtV2ForImageClassification RegNetForImageClassification ResNetForImageClassification
        SegformerForImageClassification SegformerForSemanticSegmentation SiglipVisionModel
        SwiftFormerForImageClassification SwinForImageClassification Swinv2ForImageClassification
        ViTForImageClassification ViTMAEModel ViTMSNForImageClassification YolosForObjectDetection
    """),
    *entries("vision", video, """
        TimesformerForVideoClassification VideoMAEForVideoClassification VivitForVideoClassification
    """),
    *entries("audio", wave, "Data2VecAudioForCTC HubertForCTC SEWForCTC UniSpeechForCTC UniSpeechSatForCTC"),
    *entries("audio", wave, "Wav2Vec2ConformerForCTC"),
    *entries("audio", wave, "Wav2Vec2ForCTC WavLMForCTC"),
    *entries("audio", wave, "SEWDForCTC"),
    *entries("audio", spectrogram, "LasrForCTC ParakeetForCTC"),
    *entries("audio", spectrogram, "Wav2Vec2BertForCTC"),
    *entries("audio", spectrum, "ASTForAudioClassification"),
    *entries("audio", speech, "WhisperForConditionalGeneration WhisperForAudioClassification"),
    *entries("audio", late_speech, "Speech2TextForConditionalGeneration"),
    *entries("multimodal", text_and_picture, """
        AltCLIPModel BlipForConditionalGeneration BlipModel BridgeTowerModel ChineseCLIPModel CLIPModel CLIPSegModel
        FlavaModel GitForCausalLM MetaClip2Model SiglipModel
    """),
    *entries("multimodal", text_and_picture, "GroupViTModel"),
    *entries("multimodal", text_and_picture, "ViltModel", refused=GUARD),
    *entries("multimodal", prompt(16), "LlavaForConditionalGeneration VipLlavaForConditionalGeneration"),
    *entries("multimodal", prompt(4), """
        AyaVisionForConditionalGeneration Gemma3ForConditionalGeneration InternVLForConditionalGeneration
    """),
    variant("Qwen2ForCausalLM", "cache", "decoder", cached_text),
    variant("MixtralForCausalLM", "router_logits", "MoE", text, "batched_mm", output_router_logits=True),
    variant(
        "Wav2Vec2ForCTC", "spec_augment", "audio", wave, refused_in_training="drawn from numpy.random",
        apply_spec_augment=True,
    ),
    variant("LlamaForCausalLM", "uneven", "decoder", odd_text, **ODD),
    variant("Qwen2ForCausalLM", "uneven", "decoder", odd_text, **ODD),
    variant("GPT2LMHeadModel", "uneven", "decoder", odd_text, vocab_size=103, n_head=6, n_embd=48),
    variant("BertForMaskedLM", "uneven", "encoder", odd_text, vocab_size=103, num_attention_heads=6, hidden_size=48),
    variant("T5ForConditionalGeneration", "uneven", "encoder-decoder", odd_pair, vocab_size=103, num_heads=6),
    variant("ViTForImageClassification", "uneven", "vision", picture, num_attention_heads=6, hidden_size=48),
)}  # fmt: skip
"""Every architecture, by name."""
