"""How a network is trained: numbers that belong together, and where in a training a step is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graphfold.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The rate falls as half a cosine to zero after the warm-up.

    Attributes:
        epochs: times that all samples are seen.
        batch_size: samples in a step, of all processes together.
        learning_rate: of a batch of 256 samples for SGD, in proportion for others; as it is for
            Adam.
        optimizer: SGD with Nesterov's momentum, or Adam.
        momentum: of SGD.
        weight_decay: of weights that are matrices or kernels; biases and norms have none.
        warmup: epochs in which the rate rises.
        clip: largest norm of all gradients together, None for no limit.
        augment: change the samples at random, see `samples.augment`.
        mixed: multiply in bfloat16; by default on a GPU that can.
        seed: of the order of the samples and all else that is random.
        keep: the last state, or the best one on the held-out samples.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.0
    clip: float | None = 5.0
    augment: bool = True
    mixed: bool | None = None
    seed: int = 0
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        """Refuse what no training can be made of.

        Raises:
            UsageError: a number out of its range.
        """
        limits = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate >= 0,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup <= self.epochs,
            "clip": self.clip is None or self.clip > 0,
            "seed": self.seed >= 0,
        }
        wrong = [f"{name} {getattr(self, name)}" for name, right in limits.items() if not right]
        if wrong:
            raise UsageError(f"no training has {', '.join(wrong)}")

    def to_json(self) -> dict[str, Any]:
        """For reports, and to know a training again."""
        return asdict(self)

    def rate(self, done: int, steps: int, batch: int) -> float:
        """The learning rate of a step.

        Args:
            done: steps that were made before it.
            steps: of an epoch.
            batch: samples in a step.
        """
        full = self.learning_rate * (batch / 256 if self.optimizer == "sgd" else 1.0)
        rise = self.warmup * steps
        if done < rise:
            return full * (done + 1) / (math.floor(rise) + 1)
        return full * 0.5 * (1 + math.cos(math.pi * (done - rise) / (self.epochs * steps - rise)))


@dataclass(frozen=True)
class Moment:
    """A step of a training, counted from 0.

    Attributes:
        epoch, step: the epoch, and the step in it.
        steps: of an epoch.
        epochs: of the training.
        rate: the learning rate.
    """

    epoch: int
    step: int
    steps: int
    epochs: int
    rate: float

    @property
    def done(self) -> int:
        """Steps that were made before this one."""
        return self.epoch * self.steps + self.step

    @property
    def total(self) -> int:
        """Steps of the training."""
        return self.epochs * self.steps
