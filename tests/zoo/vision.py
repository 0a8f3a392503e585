"""The registry of ``timm`` and ``torchvision`` architectures.

Neither is an ordinary dependency of the tests. PyPI's torchvision is built for PyPI's torch; beside a CPU torch its
compiled operators do not load, and importing it fails. transformers imports it wherever it is installed, and would
fail too. So ``dev.py`` installs both into a folder of their own, ``vision`` in the virtual environment, which only this
file puts on ``sys.path``; and where the compiled operators do not load, :func:`_declare_operators` gives torchvision
the two names without which it cannot be imported. The models of the zoo call none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.zoo import images
from tests.zoo.models import Entry, Inputs

FOLDER = Path(sys.prefix) / "vision"
_library: Any = None


def available() -> bool:
    """Whether timm and torchvision can be imported; makes them so, once."""
    if "torchvision" in sys.modules:
        return True
    if importlib.util.find_spec("torchvision") is None and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
        importlib.invalidate_caches()
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None:
        return False
    _declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its image codecs did not load
        importlib.import_module("torchvision")
        importlib.import_module("timm")
    return True


def _declare_operators() -> None:
    """Declares the operators that torchvision describes when it is imported, where its own library does not load."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C*.so"))))
    except (OSError, StopIteration):
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = importlib.import_module("timm")
        return timm.create_model(name, num_classes=16, **settings).eval()  # type: ignore[no-any-return]

    return build


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = importlib.import_module("torchvision.models")
        return getattr(models, name)(num_classes=16).eval()  # type: ignore[no-any-return]

    return build


def _class(path: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        return cls(num_classes=16, **settings).eval()  # type: ignore[no-any-return]

    return build


def _pictures(side: int) -> Callable[[], Inputs]:
    return lambda: {"x": images(side, side)}


TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (32, {**TRANSFORMER, "drop_rate": 0.1, "attn_drop_rate": 0.1}),
    "deit_tiny_distilled_patch16_224": (32, TRANSFORMER),
    "eva02_tiny_patch14_224": (32, TRANSFORMER),
    "beit_base_patch16_224": (32, TRANSFORMER),
    "cait_xxs24_224": (32, TRANSFORMER),
    "xcit_nano_12_p16_224": (32, TRANSFORMER),
    "swin_tiny_patch4_window7_224": (
        32, {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (4, 8)},
    ),
    "resnet10t": (32, {"channels": (16, 32, 32, 64)}),
    "resnetv2_18": (32, {"layers": (1, 1), "channels": (16, 32)}),
    "regnetx_002": (32, {}),
    "ghostnet_050": (32, {}),
    "mobilevitv2_050": (64, {}),
    "edgenext_xx_small": (64, {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    "pvt_v2_b0": (32, {"depths": (1, 1, 1, 1)}),
    "tf_efficientnetv2_b0": (32, {}),
}  # fmt: skip
"""Name in timm's own registry -> the side of its pictures, and what makes it small."""

CLASSES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "timm/mixer": (32, _class("timm.models.mlp_mixer.MlpMixer", img_size=32, patch_size=8, embed_dim=64, num_blocks=2)),
    "timm/convmixer": (32, _class("timm.models.convmixer.ConvMixer", dim=32, depth=2)),
    "timm/convnext": (32, _class("timm.models.convnext.ConvNeXt", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32))),
    "timm/poolformer": (32, _class("timm.models.metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32))),
    "torchvision/resnet18": (32, _torchvision("resnet18")),
    "torchvision/squeezenet1_1": (64, _torchvision("squeezenet1_1")),
    "torchvision/shufflenet_v2_x0_5": (32, _torchvision("shufflenet_v2_x0_5")),
    "torchvision/mobilenet_v3_small": (32, _torchvision("mobilenet_v3_small")),
    "torchvision/densenet": (32, _class(
        "torchvision.models.densenet.DenseNet", growth_rate=8, block_config=(2, 2), num_init_features=16
    )),
    "torchvision/vit": (32, _class(
        "torchvision.models.vision_transformer.VisionTransformer",
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
    )),
    "torchvision/swin_v2": (32, _class(
        "torchvision.models.swin_transformer.SwinTransformer",
        patch_size=[4, 4], embed_dim=32, depths=[1, 1], num_heads=[4, 8], window_size=[4, 4],
    )),
    "torchvision/maxvit": (32, _class(
        "torchvision.models.maxvit.MaxVit",
        input_size=(32, 32), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.1,
    )),
}  # fmt: skip

VISION: dict[str, Entry] = {
    name: Entry(name, name.partition("/")[0], build, _pictures(side))
    for name, (side, build) in {
        **{f"timm/{name}": (side, _timm(name, **settings)) for name, (side, settings) in TIMM.items()},
        **CLASSES,
    }.items()
}
"""Every architecture, by name."""
