"""What compiling costs beside capturing, and how it grows with the layers."""

from __future__ import annotations

from typing import Any

import pytest
from tabulate import tabulate

import fxshard
from fxshard import tensor_parallel
from fxshard.passes import check, propagate
from tests.models.zoo import llama

LAYERS = (2, 8, 32)
SHARE = 0.1
"""What the passes may take of the capture."""


def measure(layers: int) -> tuple[float, float, int]:
    """Seconds of the capture, seconds of all passes, and the nodes of the program."""
    model, inputs = llama(num_hidden_layers=layers)
    call: dict[str, Any] = {**inputs, "use_cache": False}
    compiled = fxshard.parallelize(model.eval(), tensor_parallel(2), (), call).compiled
    capture = compiled.times_s["capture"]
    return capture, sum(compiled.times_s.values()) - capture, len(compiled.graph.nodes)


def test_layers_that_repeat_are_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"_choose": 0, "_follows": 0}

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(module, name, counted)

    count(propagate, "_choose")
    count(check, "_follows")
    found = []
    for layers in (2, 3, 6):
        for each in calls:
            calls[each] = 0
        model, inputs = llama(num_hidden_layers=layers)
        both = fxshard.data_parallel(2) | tensor_parallel(2)
        compiled = fxshard.parallelize(model.eval(), both, (), {**inputs, "use_cache": False}).compiled
        found.append((dict(calls), len(compiled.graph.nodes)))
    (_, few), (three, some), (six, many) = found
    assert many - some == 3 * (some - few)  # each layer has its nodes,
    more = {name: six[name] - three[name] for name in calls}
    assert more["_follows"] == 0  # and none is read anew, nor decided,
    assert more["_choose"] <= 3 * 8  # but where it matters what comes behind: at the sums of a layer


@pytest.mark.slow
def test_the_passes_cost_a_fraction_of_the_capture_and_grow_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXSHARD_CACHE", raising=False)  # each capture is one
    best: dict[int, tuple[float, float]] = {}
    nodes: dict[int, int] = {}
    for attempt in range(6):  # the best of 2; of more where the machine was busy
        for layers in LAYERS:
            *took, nodes[layers] = measure(layers)
            capture, passes = best.get(layers, took)
            best[layers] = min(capture, took[0]), min(passes, took[1])
        per_node = {layers: best[layers][1] / nodes[layers] for layers in LAYERS}
        cheap = all(best[layers][1] < SHARE * best[layers][0] for layers in LAYERS[1:])  # two are hardly a model
        linear = per_node[32] < 1.6 * per_node[8]
        if attempt >= 1 and cheap and linear:
            break
    rows = [
        (layers, nodes[layers], f"{c:.2f} s", f"{p:.3f} s", f"{p / c:.1%}", f"{per_node[layers] * 1e6:.0f} us")
        for layers, (c, p) in best.items()
    ]
    table = tabulate(rows, headers=("layers", "nodes", "capture", "all passes", "of the capture", "a node"))
    print(table)
    assert nodes[32] > 3.5 * nodes[8]
    assert cheap, table
    assert linear, table
