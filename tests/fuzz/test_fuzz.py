"""A short run of the fuzzer, and that it finds what is planted: a wrong rule, a crash, a hang, a dead process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

import fxshard
from fxshard.rules.table import temporary_rule
from tests.fuzz import judge as judging
from tests.fuzz.judge import Trial, Verdict, judge
from tests.fuzz.program import Program, Statement
from tests.fuzz.programs import make
from tests.fuzz.run import Summary, one, run, shrink, with_plan

PROGRAMS = 25


def program(*lines: str, init: str = "self.m1 = nn.Linear(8, 8)", **options: bool) -> Program:
    """One of these lines."""
    statements = (Statement(lines[0], init), *map(Statement, lines[1:]))
    made = max(statements[-1].makes)
    return Program("by-hand", {"x": "torch.randn(4, 8)"}, statements, (made,), **options)  # type: ignore[arg-type]


def test_a_short_run() -> None:
    """What it finds is fixed, or is left out of ``forms.py`` with a word why."""
    summary = Summary()
    said = [line for index in range(PROGRAMS) for line in summary.add(index, one(0, index))]
    assert not summary.bad, "\n".join([*said, summary.text()])
    judged = sum(summary.counts.values())
    assert summary.counts["right"] > 0.7 * judged, summary.text(10)


@pytest.mark.slow
def test_programs_are_made_of_seed_and_index_alone() -> None:
    code = "from tests.fuzz.programs import make\nprint(''.join(make(3, i).source() for i in range(30)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run((sys.executable, "-c", code), env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "".join(make(3, i).source() for i in range(30)).strip()
    assert make(3, 1) == make(3, 1) != make(4, 1)


def test_a_wrong_rule_is_found_and_the_program_shrunk() -> None:
    given = program("v1 = self.m1(x)", "v2 = v1.tanh()", "v3 = x.cumsum(0)", "v4 = v3 * 2")
    assert with_plan(given, "preset('dp2'); ").kind == "right"
    with temporary_rule(torch.ops.aten.cumsum.default, "n ... -> n ..."):
        verdict = with_plan(given, "preset('dp2'); ")
        assert (verdict.kind, verdict.call, verdict.bad) == ("silent", "first", True)
        assert verdict.details[0].startswith("output of rank 0[0]: off by")
        assert [s.text for s in shrink(given, "preset('dp2'); ", "silent").statements] == ["v3 = x.cumsum(0)"]


@pytest.mark.parametrize(
    ("what", "call"),
    [("gradient of m1.weight", "first"), ("buffer['b']", "first"), ("random stream", "first"), ("output", "no_grad")],
)
def test_each_thing_that_is_compared_can_be_wrong(what: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("v1 = F.dropout(self.m1(x), 0.5)\nself.b.add_(1)",)
    given = program(*lines, init="self.m1 = nn.Linear(8, 8)\nself.register_buffer('b', torch.zeros(2))")
    plan = "preset('tp2'); "
    assert with_plan(given, plan).kind == "right"
    own = judging.Trial.simulated

    def simulated(self: Trial, plan: str, out: list[judging.Outcome]) -> None:
        own(self, plan, out)
        made = out[judging.CALLS.index(call)].tensors
        name = next(name for name in made if name.startswith(what))
        tensor = made[name]
        assert tensor is not None
        made[name] = tensor + 1

    monkeypatch.setattr(judging.Trial, "simulated", simulated)
    verdict = with_plan(given, plan)
    assert (verdict.kind, verdict.call) == ("silent", call)
    assert verdict.details[0].startswith(what)


def test_errors_of_others_and_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = program("v1 = self.m1(x)")
    assert with_plan(given, "Plan({'a': 2}, params={'m2.weight': Shard(0)}); ").kind == "refused"

    def fails(*args: object, **kwargs: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(fxshard, "simulate", fails)
    verdict = with_plan(given, "preset('dp2'); ")
    assert (verdict.kind, verdict.details[0]) == ("raw error", "KeyError: 'planted'")


def test_what_cannot_be_compared_is_told_apart() -> None:
    """Rounding decides it: the sign of what is zero but for rounding. And what one device does not run."""
    split = "v2 = ((v1 - v1.mean(0)).sum(0) * 1e14).sin()"
    verdicts = {with_plan(program("v1 = self.m1(x)", split), f"preset('dp{n}'); ").kind for n in (2, 3, 4)}
    assert verdicts <= {"right", "unstable"}
    assert "unstable" in verdicts
    equal = "v3 = F.layer_norm(v2.flatten()[:1].expand(24), [24])"  # of equal numbers: nothing but rounding
    verdict = with_plan(program("v1 = self.m1(x)", "v2 = v1.sin()", equal), "preset('dp3'); ")
    assert verdict.kind in ("right", "unstable")
    assert judge(program("v1 = self.m1(x[:, :3])"), lambda trial: ["preset('dp2'); "])[0].kind == "invalid"


def test_a_hang_and_a_dead_process_are_found_and_the_run_goes_on() -> None:
    def work(seed: int, index: int) -> list[Verdict]:
        if index == 1:
            time.sleep(60)
        if index == 2:
            os._exit(3)
        return [Verdict("right")]

    summary = Summary()
    for index, verdicts in run(0, 4, None, work, limit_s=2):
        summary.add(index, verdicts)
    assert dict(summary.bad) == {"hang": ["1"], "raw error": ["2"]}
    assert summary.counts["right"] == 2
    assert summary.text().splitlines()[1:] == ["hang: 1", "raw error: 2"]
