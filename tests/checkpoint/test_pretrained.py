"""Safetensors out and in: what ``from_pretrained`` opens computes the same, and what does not fit is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fxshard
from fxshard.checkpoint import pretrained
from fxshard.errors import CheckpointError
from tests.models.zoo import build, ids

transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    """Tied weights, and one that is cut in blocks."""

    def __init__(self, seed: int = 0, extra: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.qkv, self.head = nn.Embedding(12, 8), nn.Linear(8, 24), nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(2.0 + seed))
        if extra:
            self.more = nn.Linear(extra, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.table(x)).chunk(3, -1)
        return self.head(q * k + v) * self.scale


X = torch.arange(8).view(2, 4)
PLAN = {
    "qkv.*": fxshard.placement.BlockShard(0, (1, 1, 1)),
    "table.weight": fxshard.placement.BlockShard(0, shares=(2, 1)),
}


def program_of(model: nn.Module) -> fxshard.ParallelModule:
    return fxshard.parallelize(model, PLAN, (X,), mesh={"tp": 2})


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_pieces_of_any_size_make_the_same_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    fxshard.save_pretrained(program_of(model), tmp_path)
    for num_bytes in (1, 3 * 8 * 8, 7 * 8 * 8):  # a row, three, seven; or as many elements of a bias
        monkeypatch.setattr(pretrained, "PIECE_BYTES", num_bytes)
        program = program_of(Net(1))
        fxshard.load_pretrained(program, tmp_path)
        assert equal(program.full_state_dict(), model.state_dict())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fxshard.save_pretrained(program_of(Net()), tmp_path)
    staging = pretrained.Staging

    def replaced(*args: Any) -> Any:
        fxshard.save_pretrained(program_of(Net(1)), tmp_path)
        return staging(*args)

    monkeypatch.setattr(pretrained, "Staging", replaced)
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        fxshard.load_pretrained(program_of(Net(2)), tmp_path)


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    model = Net()
    fxshard.save_pretrained(program_of(model), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "checksums.json"}
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["qkv.bias", "qkv.weight", "scale", "table.weight"]
        assert file.metadata() == {"head.weight": "table.weight", "format": "pt"}
    opened = Net(1)
    safetensors.torch.load_model(opened, tmp_path / "model.safetensors")
    assert equal(opened.state_dict(), model.state_dict())
    for other in (Net(1), program_of(Net(1)), fxshard.parallelize(Net(1), PLAN, mesh={"tp": 2})):
        fxshard.load_pretrained(other, tmp_path / "model.safetensors")
        state = other.full_state_dict() if isinstance(other, fxshard.ParallelModule) else other.state_dict()
        assert equal(state, model.state_dict())
    with torch.device("meta"):
        empty = Net()
    program = program_of(empty)
    fxshard.load_pretrained(program, tmp_path)
    assert program.rank_module(1).head.weight is program.rank_module(1).table.weight
    assert torch.equal(fxshard.simulate(program, X).outputs[1], fxshard.simulate(program_of(model), X).outputs[1])
    with torch.device("meta"):
        empty = Net()
    fxshard.load_pretrained(empty, tmp_path)
    assert torch.equal(empty(X), model(X))


def test_several_files_and_an_index(tmp_path: Path) -> None:
    model = Net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "table.weight"}
    names = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(state)}
    for file in set(names.values()):
        safetensors.torch.save_file({k: v for k, v in state.items() if names[k] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    program = program_of(Net(1))
    fxshard.load_pretrained(program, tmp_path)
    assert equal(program.full_state_dict(), model.state_dict()), "the other name of a tied tensor will do"
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*\n  - FileNotFoundError: .*part-1.safetensors"):
        fxshard.load_pretrained(program, tmp_path)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    model = Net()
    model.qkv, model.scale = nn.Linear(8, 12), None
    model.other = nn.Linear(1, 1, bias=False)
    fxshard.save_pretrained(model, tmp_path)
    program = program_of(Net())
    with pytest.raises(CheckpointError) as caught:
        fxshard.load_pretrained(program, tmp_path)
    assert (
        str(caught.value)
        == f"""\
{tmp_path} does not fit Net:
  - qkv.bias has shape [12], and must have [24]
  - qkv.weight has shape [12, 8], and must have [24, 8]
  - scale is missing
  - other.weight is not in the model
  fix     read it with the model's own from_pretrained, which knows how names and forms of weights changed, and \
parallelize what that returns"""
    )
    safetensors.torch.save_file({"scale": torch.tensor(9.0), "strange": torch.ones(1)}, tmp_path / "model.safetensors")
    fxshard.load_pretrained(program, tmp_path, strict=False)
    assert equal(program.full_state_dict(), Net().state_dict() | {"scale": torch.tensor(9.0)})
    state = {name: tensor.clone() for name, tensor in Net().state_dict().items()} | {"head.weight": torch.zeros(12, 8)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"table\.weight and head\.weight are one tensor of the model"):
        fxshard.load_pretrained(program, tmp_path)
    with pytest.raises(CheckpointError, match=r"FileNotFoundError|No such file"):
        fxshard.load_pretrained(program, tmp_path / "nowhere")


class Noted(nn.Linear):
    def get_extra_state(self) -> Any:
        return 5

    def set_extra_state(self, state: Any) -> None:
        pass


def test_safetensors_hold_tensors_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors holds tensors only, and _extra_state is a int"):
        fxshard.save_pretrained(Noted(2, 2), tmp_path)
    with pytest.raises(CheckpointError, match="Linear has no save_pretrained that could take max_shard_size"):
        fxshard.save_pretrained(nn.Linear(2, 2), tmp_path, max_shard_size="1GB")


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False,
        )
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "gpt2": lambda: build("gpt2", torch.float32, n_layer=1, bos_token_id=1, eos_token_id=2)[0],
    "llama": lambda: build("llama", torch.float32, num_hidden_layers=1, tie_word_embeddings=True)[0],
    "mixtral": mixtral,
}


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_opens_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs = {"input_ids": ids() % 64, "use_cache": False}
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (), inputs)
    trained = {name: torch.randn_like(tensor) / 5 for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        trained["lm_head.weight"] = trained[
            next(n for n in trained if n.endswith(("wte.weight", "embed_tokens.weight")))
        ]
    program.load_state_dict(trained)  # the original keeps its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxshard.save_pretrained(program, tmp_path, max_shard_size="50KB")
        opened, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(fxshard.simulate(program, **inputs).outputs[0].logits, opened.eval()(**inputs).logits)
    loaded = fxshard.parallelize(MODELS[name]().eval(), fxshard.tensor_parallel(2), (), inputs)
    if name == "mixtral":
        with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj is missing(.|\n)*from_pretrained"):
            fxshard.load_pretrained(loaded, tmp_path)
        loaded = fxshard.parallelize(opened, fxshard.tensor_parallel(2), (), inputs)
    else:
        fxshard.load_pretrained(loaded, tmp_path)
    assert equal(loaded.full_state_dict(), program.full_state_dict())
