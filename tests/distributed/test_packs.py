"""Weights that are gathered together and ahead, on real ranks."""

from __future__ import annotations

import pytest

from tests.distributed import packing
from tests.distributed.launch import launch


@pytest.mark.thin(2)
@pytest.mark.parametrize("bucket_bytes", [2**20, 1200, 600, 0])
def test_what_was_gathered_ahead_is_what_is_there_now(bucket_bytes: int) -> None:
    launch(2, packing.whatever_happens, bucket_bytes)


@pytest.mark.parametrize("bucket_bytes", [2**20, 1200, 600, 0])
def test_gradients_that_go_elsewhere(bucket_bytes: int) -> None:
    launch(2, packing.gradients_go_elsewhere, bucket_bytes)


def test_many_weights_are_gathered_at_once() -> None:
    launch(2, packing.fewer_collectives)
