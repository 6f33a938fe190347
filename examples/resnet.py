"""ResNet-18, 34 and 50 in torch, with random weights and lived-in batch normalisation.

For example:

    python examples/resnet.py --depth 34 -o out/resnet34.onnx
"""

import argparse
import functools

from torch import Tensor, nn

from export import command_line
from layers import Classifier, ConvBn
from weights import randomize

WIDTHS = (64, 128, 256, 512)

# depth -> (blocks of each stage, bottleneck blocks or basic ones)
LAYOUTS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}

_ConvBnRelu = functools.partial(ConvBn, act=nn.ReLU)


class Residual(nn.Module):
    """`relu(branch(x) + shortcut(x))`; the shortcut is a 1x1 convolution where the shape changes.

    The branch is 3x3, 3x3, or as a bottleneck 1x1, 3x3, 1x1 with four times the channels out.
    """

    def __init__(self, cin: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        cout = 4 * width if bottleneck else width
        if bottleneck:
            self.branch = nn.Sequential(
                _ConvBnRelu(cin, width, 1),
                _ConvBnRelu(width, width, 3, stride),
                ConvBn(width, cout, 1, act=None),
            )
        else:
            self.branch = nn.Sequential(
                _ConvBnRelu(cin, width, 3, stride),
                ConvBn(width, cout, 3, act=None),
            )
        same = stride == 1 and cin == cout
        self.shortcut = None if same else ConvBn(cin, cout, 1, stride, act=None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """A 7x7 stem, a max pool and four stages of residual blocks; images [N, 3, H, W]."""

    def __init__(self, depth: int, classes: int = 1000) -> None:
        super().__init__()
        layout, bottleneck = LAYOUTS[depth]
        self.stem = _ConvBnRelu(3, WIDTHS[0], 7, 2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = WIDTHS[0]
        blocks: list[nn.Module] = []
        for width, repeats in zip(WIDTHS, layout, strict=True):
            for repeat in range(repeats):
                stride = 2 if repeat == 0 and width != WIDTHS[0] else 1
                blocks.append(Residual(channels, width, stride, bottleneck=bottleneck))
                channels = 4 * width if bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = Classifier(channels, classes, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.pool(self.stem(x))))


def resnet(depth: int = 18, *, seed: int = 0) -> ResNet:
    """ResNet of `depth` 18, 34 or 50 with seeded random weights, ready to evaluate."""
    return randomize(ResNet(depth), seed=seed)


def main() -> None:
    """Export the network that the command line describes."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--depth", type=int, choices=sorted(LAYOUTS), default=18)
        parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")

    command_line(
        __doc__,
        options,
        build=lambda args: resnet(args.depth, seed=args.seed),
        name=lambda args: f"resnet{args.depth}",
    )


if __name__ == "__main__":
    main()
