"""Architectures that fxshard was not built on: right under every plan, or one clear error."""

from __future__ import annotations

import functools
import os
import re

import pytest

from tests.zoo import vision
from tests.zoo.check import TRAINED, TWO_AXES, Row, Specimen, check
from tests.zoo.models import ZOO, Entry

FAST = (
    "GPTNeoXForCausalLM", "Phi3ForCausalLM", "BloomForCausalLM", "MixtralForCausalLM/batched_mm", "MambaForCausalLM",
    "ElectraForMaskedLM", "BartForConditionalGeneration", "ResNetForImageClassification", "CLIPModel",
)  # fmt: skip
"""Run always, under two plans each: a few of every family."""


@functools.lru_cache(maxsize=2)
def specimen(name: str, training: bool) -> Specimen:
    if name in vision.VISION and not vision.available():
        pytest.skip("timm and torchvision are not installed: python3 dev.py setup")
    return Specimen(entry_of(name), training)


def entry_of(name: str) -> Entry:
    return ZOO[name] if name in ZOO else vision.VISION[name]


def architectures(always: tuple[str, ...], in_turn: tuple[str, ...]) -> list[object]:
    """Each under some plans, and every second under one of others; ``python -m tests.zoo`` runs all under all."""
    found: list[object] = []
    for index, name in enumerate((*ZOO, *vision.VISION)):
        others = index % 2 == bool(always) or name in FAST or "FXSHARD_SWEEP" in os.environ
        plans = (*always, *[in_turn[index // 2 % len(in_turn)]] * others)
        fast = (plans[0], plans[-1]) if name in FAST else ()
        found += [
            pytest.param(name, plan, id=f"{name}-{plan}", marks=[] if plan in fast else pytest.mark.slow)
            for plan in plans
        ]
    return found


@pytest.mark.filterwarnings("ignore")  # the libraries', of what they deprecate
@pytest.mark.parametrize(("name", "plan"), architectures(("tp2",), ("sp2", "tp4", "dp2")))
def test_an_architecture(name: str, plan: str) -> None:
    row = is_right(name, plan, training=False)
    if plan == "tp2" and row.layer_share is not None:
        assert max(row.layer_share, row.share) >= entry_of(name).least, (
            f"only {row.layer_share:.0%} of attention and MLP is split, and {row.share:.0%} of all: {row.weights}"
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "plan"), architectures((), TRAINED))
def test_an_architecture_while_it_is_trained(name: str, plan: str) -> None:
    """Dropout draws: mask for mask what the single device draws."""
    is_right(name, plan, training=True)


@pytest.mark.thin(3)
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


def test_a_refusal_is_captured_only_once() -> None:
    refused = specimen("ViltModel", False)
    first, again = check(refused, "tp2"), check(refused, "dp2")
    assert first.error == again.error
    assert refused._refused is not None


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a gradient that was counted twice."""
    right = specimen("GPTNeoXForCausalLM", False)
    name = next(iter(right.expected.grads))
    monkeypatch.setitem(right.expected.grads, name, right.expected.grads[name] * 2)
    row = check(right, "tp2")
    assert row.verdict == "WRONG"
    assert name in row.problems[0]
