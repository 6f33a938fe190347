"""Repair by self-distillation: a changed network learns its original's outputs, without labels.

The original runs beside the student on the same augmented images. What the student minimises is
the Kullback-Leibler divergence of the original's class probabilities from its own, both softened
(for outputs that are no classes, the squared error over the variance of the original's output),
plus the same normalised error at inner tensors that both have: where images are few, most of what
there is to learn is what the original says of classes that an image does not show, and of every
place in it. Steps are Adam's, scaled by the size of the weights of each output channel, so that one
step size fits layers and networks of every scale, and they decay as a cosine to zero.

A step is made cheap: the original runs in onnxruntime, tensors lie with their channels last, what
the processor multiplies faster in bfloat16 is multiplied so where classes are learned (weights,
losses and steps stay in float32), and gradients of depthwise weights are taken of a quarter of the
batch.

Few images are easily learned by heart. Some are held back, never trained on, and decide: the best
state by their divergence is returned, and only if it is better there than the student was.
Otherwise the student comes back as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphfold.calibration.bridge import OnnxModule, bridge
from graphfold.calibration.capture import Feeds, run_with_inner
from graphfold.calibration.matching import Target, divergences, find_targets, normalised_errors
from graphfold.calibration.training_images import Images, fixed_batch
from graphfold.errors import UsageError
from graphfold.specs import model_inputs

# After bridge, which says what to install where it is missing.
import torch  # isort: skip
from torch import Tensor  # isort: skip

if TYPE_CHECKING:
    from graphfold.model import Model

_STEP_SIZE = 3e-3  # per nat of damage: what is far off is reached by longer steps only
_LEAST_STEP_SIZE, _LARGEST_STEP_SIZE = 1e-3, 3e-3
_TEMPERATURE = 2.0  # of the probabilities that are learned; those that are judged have 1
# What the mean error of the features counts: it holds for images of other classes, too, where the
# answers that few images show are learned by heart.
_FEATURES = 32.0
_EVALUATIONS = 8
_WARM_UP = 10  # steps
_DEPTHWISE_SHARE = 0.25
_MULTIPLIES_BFLOAT16 = ("avx512_bf16", "amx_bf16")
_DECAY = (0.9, 0.99)  # of Adam's averages of gradients and of their squares
_SMALLEST_SCALE = 1e-2  # of a bias that is all zeros
_TINY = 1e-12


@dataclass(frozen=True)
class Progress:
    """Where the training stands.

    Attributes:
        step: how many steps were made.
        part: how much of the training was over before the last of them, from 0 to 1.
        loss: of the last step.
        held_back: mean divergence on the held-back images when they were last looked at.
    """

    step: int
    part: float
    loss: float
    held_back: float


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        model: the repaired student, or the student as it was.
        trained: the student's best state on the held-back images, kept or not.
        is_kept: whether the held-back images confirmed the repair.
        before, after: mean divergence on the held-back images of the student as it was, and of
            its best state; `after` is that of the model only if it is kept.
        best_step: after how many steps the best state was reached.
        steps: how many were made.
        curve: step and mean held-back divergence at each evaluation.
    """

    model: Model
    trained: Model
    is_kept: bool
    before: float
    after: float
    best_step: int
    steps: int
    curve: tuple[tuple[int, float], ...]


def distill(
    student: Model,
    teacher: Model,
    batches: Feeds,
    *,
    minutes: float,
    features: Sequence[str] = (),
    step_size: float | None = None,
    steps: int | None = None,
    augment: bool = True,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Distilled:
    """Train a student to give its teacher's outputs.

    Args:
        student: the model to repair; it is not changed.
        teacher: the original, with the same inputs and outputs.
        batches: images as the models take them, by input name, samples along the first axis.
        minutes: for everything; as many steps are made as fit.
        features: names of inner tensors, the same in both models, to be matched as well.
        step_size: length of a step as a part of the size of the weights of an output channel; by
            default 0.003 times the damage on the held-back images, from 0.001 to 0.003.
        steps: make so many, as far as time allows; two runs of the same number and seed are equal.
        augment: show images mirrored, zoomed into and mixed with each other at random.
        seed: of the order of the images and of what is done to them.
        device: where torch runs.
        progress: called after each step.

    Raises:
        UsageError: the models differ in inputs or outputs, or no time is left for training.
        DataError: fewer than 10 images, or arrays that are not equally long.
        BridgeError: a model does not run in torch.
    """
    started = _now()
    targets = find_targets(student, teacher)
    names = [[target.student for target in targets], [target.teacher for target in targets]]
    learner = _prepared(bridge(student, outputs=[*names[0], *features]), device)
    if set(learner.input_names) != {each.name for each in model_inputs(teacher)}:
        raise UsageError("student and teacher do not have the same inputs")
    original = _answers(teacher, [*names[1], *features], device)
    images = Images(batches, learner.input_names, fixed_batch(student))
    training = _Training(learner, original, targets, features, images, device)
    best = _Best(_Judge(training))
    budget = _Budget(steps, started + 60 * minutes - best.seconds)
    if step_size is None:
        damage = float(best.before.mean())
        step_size = min(max(_STEP_SIZE * damage, _LEAST_STEP_SIZE), _LARGEST_STEP_SIZE)
    optimizer = _ScaledAdam(learner, step_size)
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for parts in images.shuffled(generator):
        part = budget.spent(done)
        if part >= 1.0:
            break
        if part * _EVALUATIONS >= len(best.curve):
            best.look(done)
        loss = torch.stack(
            [
                training.loss(images.batch(rows, device, generator if augment else None))
                for rows in parts
            ]
        ).mean()
        optimizer.step(loss, _schedule(done, part))
        done += 1
        if progress is not None:
            progress(Progress(done, part, float(loss.detach()), best.curve[-1][1]))
    best.look(done)
    is_kept = bool(best.divergences.mean() < best.before.mean())
    learner.load_state_dict(best.state)
    trained = learner.to_model()
    return Distilled(
        trained if is_kept else student.clone(),
        trained,
        is_kept,
        float(best.before.mean()),
        float(best.divergences.mean()),
        best.step,
        done,
        tuple(best.curve),
    )


_now = time.monotonic
Answers = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


# --- cheap steps ------------------------------------------------------------------------------


def _prepared(module: OnnxModule, device: str) -> OnnxModule:
    """The module where it is to run, made for cheap steps."""
    module.to(device)
    module.depthwise_share = _DEPTHWISE_SHARE
    for weight in module.parameters():
        weight.data = _channels_last(weight.data)
    return module


def _answers(teacher: Model, names: Sequence[str], device: str) -> Answers:
    """The teacher's outputs and inner tensors; on a CPU onnxruntime is faster than torch."""
    if device != "cpu":
        return _without_gradient(_prepared(bridge(teacher, outputs=names), device))
    run = run_with_inner(teacher, names, torch.get_num_threads())

    def answer(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = run({name: tensor.contiguous().numpy() for name, tensor in batch.items()})
        return {name: torch.from_numpy(found[name]) for name in names}

    return answer


def _without_gradient(module: OnnxModule) -> Answers:
    def answer(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return _wide(module({name: _channels_last(item) for name, item in batch.items()}))

    return answer


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; elsewhere it is slower than float32."""
    # Older torch does not tell.
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in _MULTIPLIES_BFLOAT16)


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    narrow = torch.bfloat16
    return {name: t.float() if t.dtype == narrow else t for name, t in tensors.items()}


# --- time -------------------------------------------------------------------------------------


class _Budget:
    """How much of the training is over, by steps where their number is given, else by time."""

    def __init__(self, steps: int | None, end: float) -> None:
        self._steps = steps
        self._begin, self._end = _now(), end
        if self._begin >= end:
            raise UsageError(
                "no time is left for training: reading and judging the images took all of it",
                hint="give more minutes",
            )

    def spent(self, done: int) -> float:
        """From 0 to 1."""
        now = _now()
        by_time = (now - self._begin) / (self._end - self._begin)
        if self._steps is None or by_time >= 1.0:
            return by_time
        return done / self._steps


def _schedule(done: int, part: float) -> float:
    """The part of the full step size: a short rise, then half a cosine to zero."""
    rise = min(1.0, (done + 1) / _WARM_UP)
    return rise * 0.5 * (1.0 + math.cos(math.pi * part))


class _Training:
    """Student and teacher with what is to be matched."""

    def __init__(
        self,
        student: OnnxModule,
        teacher: Answers,
        targets: Sequence[Target],
        features: Sequence[str],
        images: Images,
        device: str,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.targets = targets
        self.features = features
        self.images = images
        self.device = device

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Divergence of the outputs plus the mean error of the features."""
        planes = {name: _channels_last(tensor) for name, tensor in batch.items()}
        with self._products():
            own = _wide(self.student(planes))
        other = self.teacher(batch)
        total = self._output_divergences(own, other, _TEMPERATURE).mean()
        errors = [normalised_errors(own[name], other[name]).mean() for name in self.features]
        return total + _FEATURES * sum(errors) / len(errors) if errors else total

    def _products(self) -> AbstractContextManager[object]:
        """Values are wanted more exactly than bfloat16 has them, classes are not."""
        helps = self.device == "cpu" and _multiplies_bfloat16()
        is_enough = all(target.is_logits for target in self.targets)
        return torch.autocast("cpu", torch.bfloat16, enabled=helps and is_enough)

    def _output_divergences(
        self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], temperature: float = 1.0
    ) -> Tensor:
        parts = [
            divergences(own[t.student], other[t.teacher], t, temperature) for t in self.targets
        ]
        return torch.stack(parts).mean(0)

    def divergences(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Of the outputs alone, for each image."""
        return self._output_divergences(student, teacher)


class _Judge:
    """Divergence on the held-back images; the teacher's outputs are computed once."""

    def __init__(self, training: _Training) -> None:
        self._training = training
        images = training.images
        self._rows = images.judged()
        names = [target.teacher for target in training.targets]
        self._expected = []
        for rows in self._rows:
            found = training.teacher(images.batch(rows, training.device, None))
            self._expected.append({name: found[name] for name in names})

    def divergences(self) -> Tensor:
        """For each image, in order, in double precision on the CPU."""
        training = self._training
        parts = []
        with torch.no_grad():
            for rows, expected in zip(self._rows, self._expected, strict=True):
                found = training.student(training.images.batch(rows, training.device, None))
                parts.append(training.divergences(found, expected).double().cpu())
        return torch.nan_to_num(torch.cat(parts), nan=math.inf)

    def state(self) -> dict[str, Tensor]:
        """A copy of the student's tensors."""
        state = self._training.student.state_dict()
        return {key: item.detach().clone() for key, item in state.items()}


class _Best:
    """The student's best state so far after training began, by the held-back images."""

    def __init__(self, judge: _Judge) -> None:
        self._judge = judge
        begin = _now()
        self.before = judge.divergences()
        self.divergences = torch.full_like(self.before, math.inf)
        self.seconds = _now() - begin
        self.step = 0
        self.state = judge.state()
        self.curve = [(0, float(self.before.mean()))]

    def look(self, done: int) -> None:
        """Judge the student after so many steps."""
        found = self._judge.divergences()
        self.curve.append((done, float(found.mean())))
        if done and found.mean() < self.divergences.mean():
            self.divergences, self.step, self.state = found, done, self._judge.state()


# --- steps ------------------------------------------------------------------------------------


class _ScaledAdam:
    """Adam in units of the size of each output channel's weights at the start."""

    def __init__(self, module: OnnxModule, step_size: float) -> None:
        self._step_size = step_size
        self._weights = list(module.weights.items())
        self._scales = [_scale(module, name, weight) for name, weight in self._weights]
        self._averages = [torch.zeros_like(weight) for _, weight in self._weights]
        self._squares = [torch.zeros_like(weight) for _, weight in self._weights]
        self._count = 0

    def step(self, loss: Tensor, part: float) -> None:
        """One step down, `part` of the full size."""
        weights = [weight for _, weight in self._weights]
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, weights, allow_unused=True)
        self._count += 1
        first, second = (1 - decay**self._count for decay in _DECAY)
        everything = zip(
            self._weights, gradients, self._scales, self._averages, self._squares, strict=True
        )
        with torch.no_grad():
            for (_, weight), gradient, scale, average, square in everything:
                if gradient is None:
                    continue
                average.lerp_(gradient, 1 - _DECAY[0])
                square.lerp_(gradient.square(), 1 - _DECAY[1])
                direction = (average / first) / ((square / second).sqrt() + _TINY)
                weight.sub_(self._step_size * part * scale * direction)


def _scale(module: OnnxModule, name: str, weight: Tensor) -> Tensor:
    """Root mean square of the weights of each output channel, or of a whole bias."""
    values = weight.detach()
    axis = _channel_axis(module, name)
    if axis is None or values.ndim < 2:
        return values.square().mean().sqrt().clamp(min=_SMALLEST_SCALE)
    others = [other for other in range(values.ndim) if other != axis % values.ndim]
    return values.square().mean(others, keepdim=True).sqrt()


def _channel_axis(module: OnnxModule, name: str) -> int | None:
    """The axis of a weight that counts its layer's outputs."""
    for call, index in module.readers(name):
        if index != 1:
            continue
        if call.op_type in ("Conv", "ConvTranspose"):
            return 0 if call.op_type == "Conv" else 1
        if call.op_type in ("Gemm", "MatMul"):
            return 0 if call.get("transB", 0) else -1
    return None
