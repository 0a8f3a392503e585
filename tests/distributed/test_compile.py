"""``torch.compile`` and ``torch.export`` over programs on real ranks; see docs/compile.md."""

from __future__ import annotations

import shutil

import pytest

from tests.distributed import compiling
from tests.distributed.launch import launch
from tests.helpers import slow_but_for

TRACED = "aot_eager"
"""Traces forward and backward pass as inductor does, and runs the graphs as they are."""

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@slow_but_for("plans", [("tp2", "zero2"), ("sp2", "dp2")], ("tp2", "zero2"))
def test_a_compiled_program_equals_the_model(plans: tuple[str, ...]) -> None:
    launch(2, compiling.equal_the_original, [("block", plan) for plan in plans], TRACED)


@pytest.mark.slow
def test_gradients_of_inputs_and_of_weights_that_thaw() -> None:
    launch(2, compiling.inputs_get_gradients, TRACED)


@pytest.mark.slow
def test_dynamic_sizes_share_a_graph() -> None:
    launch(2, compiling.many_sizes, [("block", "dp2"), ("block", "tp2")], TRACED)


@pytest.mark.slow
def test_buffers_change_as_the_model_says() -> None:
    launch(2, compiling.buffers, TRACED)


@pytest.mark.slow
def test_programs_within_compiled_code() -> None:
    launch(2, compiling.inside_of_other_code, TRACED)


@pytest.mark.slow
def test_what_cannot_be_traced_runs_eagerly() -> None:
    launch(2, compiling.run_eagerly_where_it_must, TRACED)


@pytest.mark.slow
def test_a_new_mode_is_captured_eagerly() -> None:
    launch(2, compiling.a_new_mode, TRACED)


@pytest.mark.slow
def test_no_sync_runs_eagerly() -> None:
    launch(2, compiling.wait_with_the_sums, TRACED)


@pytest.mark.slow
def test_graphs_communicate_as_asked() -> None:
    launch(2, compiling.what_the_graphs_communicate)


@pytest.mark.slow
def test_exported_programs() -> None:
    launch(2, compiling.exported)


# --- inductor, and models of transformers ----------------------------------------------------------------------------

CASES = [("block", "tp2"), ("block", "zero2"), ("llama", "sp2"), ("gpt2", "dp2")]
"""Each compiler run takes some ten seconds: what can be traced is tried above, under every plan."""


@pytest.mark.slow
@needs_compiler
def test_inductor_equals_the_model() -> None:
    launch(2, compiling.equal_the_original, CASES, "inductor")


@pytest.mark.slow
@needs_compiler
def test_inductor_on_two_axes() -> None:
    launch(4, compiling.equal_the_original, [("block", "zero2_tp2")], "inductor")


@pytest.mark.slow
@needs_compiler
def test_inductor_with_dynamic_sizes() -> None:
    launch(2, compiling.many_sizes, [("block", "dp2")], "inductor")


@pytest.mark.slow
@needs_compiler
def test_inductor_trains() -> None:
    launch(2, compiling.train, [("llama", "zero2")], "inductor")


@pytest.mark.slow
@needs_compiler
def test_checkpointed_layers() -> None:
    launch(2, compiling.checkpointed, "zero2")


@pytest.mark.slow
@needs_compiler
def test_packages() -> None:
    launch(2, compiling.packaged, [("block", "tp2"), ("llama", "tp2")])
