"""MobileNetV2 in torch, with random weights and lived-in batch normalisation; exports to ONNX.

For example:

    python examples/mobilenet_v2.py --width 1.4 --exporter torchscript --opset 17 --no-bn
"""

import argparse

from torch import Tensor, nn

from export import command_line
from layers import Classifier, ConvBn, InvertedResidual, make_divisible
from weights import randomize

# (expansion, channels, repeats, stride of the first repeat)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Seventeen inverted residual blocks between a stem and a head; images [N, 3, H, W]."""

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = make_divisible(32 * width)
        head = make_divisible(1280 * max(1.0, width))
        self.stem = ConvBn(3, channels, 3, 2)
        blocks: list[nn.Module] = []
        for expansion, base, repeats, stride in STAGES:
            cout = make_divisible(base * width)
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(
                    InvertedResidual(channels, cout, expansion=expansion, kernel=3, stride=step)
                )
                channels = cout
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBn(channels, head, 1)
        self.classifier = Classifier(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))))


def mobilenet_v2(width: float = 1.0, *, seed: int = 0) -> MobileNetV2:
    """MobileNetV2 with seeded random weights, ready to evaluate."""
    return randomize(MobileNetV2(width), seed=seed)


def main() -> None:
    """Export the network that the command line describes."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--width", type=float, default=1.0, help="width multiplier")
        parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")

    command_line(
        __doc__,
        options,
        build=lambda args: mobilenet_v2(args.width, seed=args.seed),
        name=lambda args: f"mobilenet_v2_{args.width:g}",
    )


if __name__ == "__main__":
    main()
