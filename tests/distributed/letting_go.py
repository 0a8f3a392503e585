"""What ranks run to show that a program needs the model's structure only, once its parts are placed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist

import fxshard
from fxshard.errors import FxshardError
from tests.distributed.ranks import run_rank
from tests.helpers import problems_of, run_original
from tests.models.zoo import build, sized
from tests.presets import preset


def a_rank_lets_the_model_go(plan: str) -> None:
    """Other signatures and modes are captured from the structure; state dicts and ``verify`` need no more."""
    for name in ("llama", "gpt2"):
        kept, inputs = build(name)
        model = copy.deepcopy(kept)
        program = fxshard.parallelize(model, preset(plan), (), {})
        program(**inputs)
        weight = weakref.ref(next(model.parameters()))
        del model
        gc.collect()
        assert weight() is None, gc.get_referrers(weight())
        for call in (inputs, sized(name, 2, 8)):
            expected = run_original(kept, (), call)
            assert not problems_of(run_rank(program, call), expected)
        assert len(program._captures.all) == 2
        program.zero_grad()
        assert fxshard.verify(program, **inputs).ok
        whole = kept.state_dict()
        assert all(torch.equal(found, whole[key]) for key, found in program.full_state_dict().items())
        program.load_state_dict({key: value + 1 for key, value in whole.items()})
        assert all(torch.equal(found, whole[key] + 1) for key, found in program.full_state_dict().items())
        program.train()
        program(**inputs)
        with pytest.raises(FxshardError, match="the model is gone"):
            program.rank_module(1 - dist.get_rank())


def what_the_user_keeps_stays(plan: str) -> None:
    """The user's model is as it was, and what is changed of it counts in later captures."""
    model, inputs = build("llama")
    model = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = fxshard.parallelize(model, preset(plan))
    assert "past_key_values" in program(**inputs)
    model.config.use_cache = False
    assert "past_key_values" not in program(**sized("llama", 2, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def autocast_after_the_model_is_gone(plan: str) -> None:
    """A capture of a model whose weights are gone casts as one of a model that has them does."""
    kept, inputs = build("llama", torch.float32)
    inputs["use_cache"] = False
    model = copy.deepcopy(kept)
    program = fxshard.parallelize(model, preset(plan))
    program(**inputs)
    del model
    gc.collect()
    with torch.autocast("cpu", torch.bfloat16):
        found, want = program(**inputs).logits, kept(**inputs).logits
    assert found.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(found, want, rtol=5e-2, atol=5e-2)
    assert (found.float() - program(**inputs).logits).abs().max() > 1e-4, "nothing was rounded"
