"""Architectures that fxshard was not built on: right under every plan, or one clear error."""

from __future__ import annotations

import functools
import re

import pytest

from tests.zoo import vision
from tests.zoo.check import PLANS, TWO_AXES, Row, Specimen, check
from tests.zoo.models import ZOO, Entry

FAST = (
    "GPTNeoXForCausalLM", "Phi3ForCausalLM", "BloomForCausalLM", "MixtralForCausalLM/batched_mm", "MambaForCausalLM",
    "ElectraForMaskedLM", "BartForConditionalGeneration", "ResNetForImageClassification", "CLIPModel",
)  # fmt: skip
"""Run always: a few of every family."""

WHOLE = {
    "experts": """
        AfmoeForCausalLM/batched_mm AfmoeForCausalLM/grouped_mm DeepseekV2ForCausalLM/batched_mm
        DeepseekV3ForCausalLM/batched_mm DeepseekV3ForCausalLM/grouped_mm Dots1ForCausalLM/batched_mm
        Ernie4_5_MoeForCausalLM/batched_mm Glm4MoeForCausalLM/batched_mm GptOssForCausalLM/batched_mm
        GptOssForCausalLM/grouped_mm GraniteMoeForCausalLM/batched_mm GraniteMoeHybridForCausalLM/batched_mm
        GraniteMoeSharedForCausalLM/batched_mm HunYuanMoEV1ForCausalLM/batched_mm JambaForCausalLM/batched_mm
        JetMoeForCausalLM Lfm2MoeForCausalLM/batched_mm MiniMaxForCausalLM/batched_mm MixtralForCausalLM/batched_mm
        MixtralForCausalLM/grouped_mm MixtralForCausalLM/router_logits NemotronHForCausalLM/batched_mm
        PhimoeForCausalLM/batched_mm Qwen2MoeForCausalLM/batched_mm Qwen2MoeForCausalLM/grouped_mm
        Qwen3MoeForCausalLM/batched_mm Qwen3NextForCausalLM/grouped_mm
    """,
    "experts, and the queries and keys before a norm over all heads": """
        FlexOlmoForCausalLM/batched_mm MiniMaxM2ForCausalLM/batched_mm OlmoeForCausalLM/batched_mm
    """,
    "queries and keys before a norm over all heads": "Olmo2ForCausalLM Olmo3ForCausalLM OlmoHybridForCausalLM",
    "the projections of a state space": """
        BambaForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM MambaForCausalLM Mamba2ForCausalLM RwkvForCausalLM
        Zamba2ForCausalLM
    """,
    "projections of latent attention, which all heads read": "MiniCPM3ForCausalLM",
    "a packed projection of all queries and one key": "FalconForCausalLM GPTBigCodeForCausalLM",
    "weights that are scaled by their own mean": "BitNetForCausalLM",
    "heads that no two ranks divide": """
        GLPNForDepthEstimation LlamaForCausalLM/uneven Qwen2ForCausalLM/uneven timm/pvt_v2_b0
    """,
    "what mixes heads, or what no row follows": """
        BridgeTowerModel ConvBertForMaskedLM ConvNextV2ForImageClassification CvtForImageClassification
        FocalNetForImageClassification FunnelForMaskedLM SwiftFormerForImageClassification Swinv2ForImageClassification
        TimesformerForVideoClassification timm/cait_xxs24_224
    """,
}
"""What ``tensor_parallel`` leaves whole of attention and MLP -> where that is more than a twentieth of them."""


@functools.lru_cache(maxsize=2)
def specimen(name: str, training: bool) -> Specimen:
    if name in vision.VISION and not vision.available():
        pytest.skip("timm and torchvision are not installed: python3 dev.py setup")
    return Specimen(entry_of(name), training)


def entry_of(name: str) -> Entry:
    return ZOO[name] if name in ZOO else vision.VISION[name]


def architectures(*plans: str) -> list[object]:
    return [
        pytest.param(name, plan, id=f"{name}-{plan}", marks=[] if name in FAST else pytest.mark.slow)
        for name in (*ZOO, *vision.VISION)
        for plan in plans
    ]


@pytest.mark.filterwarnings("ignore")  # the libraries', of what they deprecate
@pytest.mark.parametrize(("name", "plan"), architectures(*PLANS))
def test_an_architecture(name: str, plan: str) -> None:
    row = is_right(name, plan, training=False)
    excused = any(name in names.split() for names in WHOLE.values())
    if plan == "tp2" and row.layer_share is not None and not excused:
        assert row.layer_share >= 0.95, f"only {row.layer_share:.0%} of attention and MLP is split: {row.weights}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "plan"), architectures("tp2"))
def test_an_architecture_while_it_is_trained(name: str, plan: str) -> None:
    """Dropout draws: mask for mask what the single device draws."""
    is_right(name, plan, training=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAST)
def test_an_architecture_on_two_axes(name: str) -> None:
    is_right(name, *TWO_AXES, training=False)


def is_right(name: str, plan: str, training: bool) -> Row:
    entry, row = entry_of(name), check(specimen(name, training), plan)
    refused = entry.refused
    if training and entry.refused_in_training is not None:
        refused = entry.refused_in_training
    if refused:
        assert row.refused
        assert re.search(refused, row.error)
        return row
    assert not row.error, row.error
    assert not row.problems, "\n".join([f"{name} differs from the original under {plan}", *row.problems[:20]])
    return row


def test_what_is_whole_is_of_the_zoo() -> None:
    assert {name for names in WHOLE.values() for name in names.split()} <= ZOO.keys() | vision.VISION.keys()


def test_a_refusal_is_captured_only_once() -> None:
    refused = specimen("BloomForCausalLM", False)
    first, again = check(refused, "tp2"), check(refused, "dp2")
    assert first.error == again.error
    assert refused._captured is not None


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a gradient that was counted twice."""
    right = specimen("GPTNeoXForCausalLM", False)
    name = next(iter(right.expected.grads))
    monkeypatch.setitem(right.expected.grads, name, right.expected.grads[name] * 2)
    row = check(right, "tp2")
    assert row.verdict == "WRONG"
    assert name in row.problems[0]
