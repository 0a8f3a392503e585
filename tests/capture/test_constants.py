"""Inputs whose values decide shapes, declared to be constants."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard.errors import CaptureError, InputError, PlanError
from tests.helpers import slow_but_for
from tests.presets import preset


class Patches(nn.Module):
    """Positions and lengths that stand in a grid: a row [frames, height, width] an image, as Qwen2-VL has it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.table = nn.Linear(8, 16), nn.Linear(16, 8), nn.Embedding(12, 8)

    def forward(self, x: torch.Tensor, grid: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        rows = []
        for t, h, w in grid:
            at = torch.arange(h).unsqueeze(1).expand(-1, w).flatten()
            rows.append(at.repeat(int(t)))
        x = x + self.table(torch.cat(rows)) * scale
        lengths = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        ends = F.pad(lengths.cumsum(0), (1, 0))
        parts = [self.down(self.up(part).relu()).mean(0) for part in torch.split(x, (ends[1:] - ends[:-1]).tolist())]
        means = x[: grid.prod(-1).max()].mean(0) * grid[0, 1] + (x.sum() * grid.sum()) / grid.numel()
        return {"parts": torch.stack(parts), "means": means, "grid": grid * 2}


GRIDS = [[[1, 2, 3]], [[2, 2, 2], [1, 3, 1]], [[1, 4, 2], [1, 1, 1]], [[1, 2, 3]]]


@slow_but_for("plan", ("tp2", "dp2", "zero2"), "tp2")
def test_each_grid_is_a_capture(plan: str) -> None:
    torch.manual_seed(0)
    model = Patches().double()
    first = torch.tensor(GRIDS[0])
    x = torch.randn(6, 8, dtype=torch.float64)
    program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (x, first), constants="grid")
    for rows in GRIDS:
        grid = torch.tensor(rows)
        x = torch.randn(int(grid.prod(-1).sum()), 8, dtype=torch.float64)
        want = model(x, grid)
        for out in fxshard.simulate(program, x, grid=grid).outputs:
            torch.testing.assert_close(out, want)
    assert len(program._captures.all) == 3
    assert fxshard.verify(program, x, torch.tensor(GRIDS[-1])).ok


def test_other_inputs_are_held_as_ever() -> None:
    x, grid = torch.randn(6, 8), torch.tensor(GRIDS[0])
    program = fxshard.parallelize(Patches(), preset("tp2"), (x, grid), constants=("gr*",))
    with pytest.raises(InputError, match=r"expected float32\[6, 8\]"):
        fxshard.simulate(program, x[:4], grid)


def test_what_is_not_declared_is_refused_and_names_are_checked() -> None:
    x, grid = torch.randn(6, 8), torch.tensor(GRIDS[0])
    with pytest.raises(CaptureError):
        fxshard.parallelize(Patches(), preset("tp2"), (x, grid))
    with pytest.raises(PlanError, match="'gird', which is no input"):
        fxshard.parallelize(Patches(), preset("tp2"), (x, grid), constants="gird")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp2", "sp2"])
def test_qwen2_vl(plan: str) -> None:
    config = transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
        },
        image_token_id=7, video_token_id=8, vision_start_token_id=9, vision_end_token_id=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).double().eval()
    inputs = batch(model, [[1, 4, 4]])
    program = fxshard.parallelize(model, preset(plan), (), inputs, constants="image_grid_thw")
    assert fxshard.verify(program, **inputs).ok
    other = batch(model, [[1, 4, 8]])
    for out in fxshard.simulate(program, **other).outputs:
        torch.testing.assert_close(out.logits, model(**other).logits)


def batch(model: nn.Module, grid: list[list[int]]) -> dict[str, object]:
    thw = torch.tensor(grid)
    patches = int(thw.prod(-1).sum())
    ids = torch.tensor([[1, 2, 9, *[7] * (patches // 4), 10, 3, 4]])
    kinds, mask = (ids == 7).int(), torch.ones_like(ids)
    positions, _ = model.model.get_rope_index(ids, kinds, thw, attention_mask=mask)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, dtype=torch.float64),
        "image_grid_thw": thw,
        "mm_token_type_ids": kinds,
        "use_cache": False,
    }
