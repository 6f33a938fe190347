"""The example networks by name, built and exported once per process."""

import functools
from collections.abc import Callable

import onnx
from torch import nn

from efficientnet_lite import VARIANTS, efficientnet_lite
from export import Exporter, export
from mobilenet_v2 import mobilenet_v2
from resnet import LAYOUTS, resnet

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2_1.0": lambda: mobilenet_v2(1.0),
    "mobilenet_v2_1.4": lambda: mobilenet_v2(1.4),
    **{
        # at 224, the size that the papers count them at
        f"efficientnet_lite{variant}": functools.partial(efficientnet_lite, variant, size=224)
        for variant in VARIANTS
    },
    **{f"resnet{depth}": functools.partial(resnet, depth) for depth in LAYOUTS},
}


@functools.cache
def network(name: str) -> nn.Module:
    """The network `name` of `NETWORKS`, in evaluation mode; shared, so leave it as it is."""
    return NETWORKS[name]()


@functools.cache
def _exported(
    name: str,
    exporter: Exporter,
    opset: int | None,
    keep_bn: bool,
    keep_pads: bool,
    dynamic_size: bool,
) -> onnx.ModelProto:
    return export(
        network(name),
        exporter=exporter,
        opset=opset,
        keep_bn=keep_bn,
        keep_pads=keep_pads,
        dynamic_size=dynamic_size,
    )


def exported(
    name: str,
    *,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    keep_bn: bool = True,
    keep_pads: bool = False,
    dynamic_size: bool = False,
) -> onnx.ModelProto:
    """The network `name` as ONNX, with a dynamic batch; see `export.export`.

    Exported once for each set of arguments; every call returns a copy of its own.
    """
    model = onnx.ModelProto()
    model.CopyFrom(_exported(name, exporter, opset, keep_bn, keep_pads, dynamic_size))
    return model
