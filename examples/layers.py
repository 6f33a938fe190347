"""The layers that the example networks are made of."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pads = tuple[int, int]  # (begin, end), the same along both axes


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round `channels` to a multiple of `divisor`, never losing more than 10 %."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def same_pads(size: int, kernel: int, stride: int) -> Pads:
    """TensorFlow's "SAME" padding of one axis of `size`: the odd zero goes to the end."""
    outputs = -(-size // stride)
    total = max(0, (outputs - 1) * stride + kernel - size)
    return total // 2, total - total // 2


class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding may differ between the two ends of an axis.

    Torch's own convolution pads both ends alike, so uneven pads run as a separate zero pad;
    an exporter writes that as a `Pad` node (see `export.fuse_pads`).
    """

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int, pads: Pads, groups: int = 1
    ) -> None:
        begin, end = pads
        even = begin if begin == end else 0
        super().__init__(cin, cout, kernel, stride, padding=even, groups=groups, bias=False)
        self.uneven = None if begin == end else (begin, end, begin, end)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.uneven is None else F.pad(x, self.uneven))


class ConvBn(nn.Sequential):
    """Convolution, batch normalisation and, where `act` is given, an activation."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        stride: int = 1,
        *,
        pads: Pads | None = None,
        groups: int = 1,
        eps: float = 1e-5,
        act: Callable[[], nn.Module] | None = nn.ReLU6,
    ) -> None:
        pads = (kernel // 2, kernel // 2) if pads is None else pads
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=PaddedConv2d(cin, cout, kernel, stride, pads, groups),
            bn=nn.BatchNorm2d(cout, eps=eps),
        )
        if act is not None:
            layers["act"] = act()
        super().__init__(layers)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (depthwise), project (1x1, linear), add the input.

    With `expansion` 1 there is no expand convolution; the input is added only where the shape
    stays the same.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        pads: Pads | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = cin * expansion
        self.expand = ConvBn(cin, hidden, 1, eps=eps) if expansion != 1 else None
        self.depthwise = ConvBn(hidden, hidden, kernel, stride, pads=pads, groups=hidden, eps=eps)
        self.project = ConvBn(hidden, cout, 1, eps=eps, act=None)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class Classifier(nn.Module):
    """Global average pooling, dropout (inert when evaluating) and a linear layer."""

    def __init__(self, channels: int, classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(torch.flatten(self.pool(x), 1)))
