"""Loading takes no more memory than what a rank owns, in real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed import loading
from tests.distributed.launch import launch


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason=f"{sys.platform} does not tell peaks of memory")
def test_loading_takes_the_memory_of_the_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = loading.build()
    with torch.no_grad():
        torch.save(model(torch.ones(2, loading.NARROW)), tmp_path / "expected.pt")
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    del model
    launch(2, loading.load_and_measure, str(tmp_path), fresh=True)
