"""From a picture to what a network reads: resize, centre crop, scale, mean, standard deviation.

Every value is (x * scale - mean) / std, where x is from 0 to 255. Ways of preparing are data: a
name of the table below, or a JSON file with the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graphfold.errors import DataError, Problem, ProblemsError
from graphfold.plan import json_path, nearest
from graphfold.specs import InputSpec, describe_shape

if TYPE_CHECKING:
    from PIL.Image import Image

Finite = Annotated[float, Field(allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1)]

# Where neither the model nor the preprocessing fixes it.
USUAL_SIZE = 224


class PreprocessError(ProblemsError, DataError):
    """A preprocessing file that is malformed; all problems at once."""

    subject = "preprocessing"


class Preprocess(BaseModel):
    """How images are prepared. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: Pixels | tuple[Pixels, Pixels] | None = Field(
        default=None,
        description="height and width of the result, or one number for both; by default what the "
        "model takes, and 224 where it leaves that open",
    )
    resize: Pixels | None = Field(
        default=None, description="short side before the crop; excludes crop_fraction"
    )
    crop_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="share of the largest centred window of the result's proportions that is kept",
    )
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"
    channels: Literal["RGB", "BGR", "L"] = Field(default="RGB", description="order; L is grey")
    scale: Finite = Field(default=1 / 255, description="factor on values from 0 to 255")
    mean: tuple[Finite, ...] = Field(
        default=(0.0,), description="subtracted, per channel in their order, or once"
    )
    std: tuple[Finite, ...] = Field(
        default=(1.0,), description="divided by, per channel in their order, or once"
    )
    layout: Literal["NCHW", "NHWC"] | None = Field(
        default=None, description="by default what the model's input has"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        if self.resize is not None and self.crop_fraction is not None:
            raise ValueError("resize and crop_fraction exclude each other")
        allowed = (1,) if self.channels == "L" else (1, 3)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in allowed:
                wanted = " or ".join(map(str, allowed))
                raise ValueError(f"{name} has {len(values)} values, {self.channels} wants {wanted}")
        if 0 in self.std:
            raise ValueError("std must not be 0")
        return self

    @property
    def depth(self) -> int:
        """Number of channels."""
        return 1 if self.channels == "L" else 3


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NAMED: Mapping[str, Preprocess] = {
    "imagenet": Preprocess(crop_fraction=0.875, **_IMAGENET),  # type: ignore[arg-type]
    "lite": Preprocess(
        crop_fraction=0.875, interpolation="bicubic", scale=1.0, mean=(127.0,), std=(128.0,)
    ),
    "unit": Preprocess(),
    "symmetric": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "raw": Preprocess(scale=1.0),
}


def read_preprocess(source: str) -> Preprocess:
    """What a name of `NAMED` or a JSON file says.

    Raises:
        DataError: no such name or file, or a malformed one; all problems at once.
    """
    if source in NAMED:
        return NAMED[source]
    path = Path(source)
    if path.suffix != ".json" and not path.exists():
        near = nearest(source, NAMED)
        names = f"one of {', '.join(NAMED)}, or a JSON file"
        raise DataError(f"there is no preprocessing {source!r}", hint=near or names)
    try:
        return Preprocess.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=source) from None
    except ValidationError as error:
        problems = [_problem(dict(detail)) for detail in error.errors()]
        raise PreprocessError(problems, where=source) from None


def _problem(detail: dict[str, Any]) -> Problem:
    # Alternatives of a type are told by a name in the location that is no key of the file.
    location = tuple(part for part in detail["loc"] if part not in ("int", "constrained-int"))
    path = json_path(location) or "file"
    match detail["type"]:
        case "json_invalid":
            return Problem("file", f"not JSON: {detail['ctx']['error']}")
        case "extra_forbidden":
            return Problem(path, "unknown key", nearest(str(location[-1]), Preprocess.model_fields))
        case "literal_error":
            return Problem(
                path, f"{detail['input']!r} is not valid", f"one of {detail['ctx']['expected']}"
            )
        case "value_error":
            return Problem(path, str(detail["ctx"]["error"]))
    return Problem(path, f"{detail['msg']}, not {json.dumps(detail['input'], default=str)}")


class Preparation:
    """A preprocessing bound to a model's input: pictures in, arrays of one sample out.

    Args:
        preprocess: what is to be done.
        spec: the model's input.
        where: names the data in messages.

    Raises:
        DataError: the input takes no such images; says what it takes.
    """

    def __init__(self, preprocess: Preprocess, spec: InputSpec, where: str) -> None:
        from graphfold.specs import numpy_dtype

        self._preprocess = preprocess
        self._dtype = numpy_dtype(spec)
        if len(spec.shape) != 4:
            raise DataError(
                f"images for input {spec.name!r}, which is {describe_shape(spec.shape)}",
                where=where,
                hint="an input of four axes takes images; give an .npz or a callable",
            )
        self.layout = preprocess.layout or _layout(spec.shape, preprocess.depth)
        planes, height, width = (1, 2, 3) if self.layout == "NCHW" else (3, 1, 2)
        self._check_depth(spec, planes, where)
        self._size = self._chosen_size(spec, (spec.shape[height], spec.shape[width]), where)
        self._check_dtype(spec, where)

    def _check_depth(self, spec: InputSpec, axis: int, where: str) -> None:
        wanted, depth = spec.shape[axis], self._preprocess.depth
        if isinstance(wanted, int) and wanted != depth:
            known = {1: ' (channels: "L" in the preprocessing)', 3: ' (channels: "RGB")'}
            raise DataError(
                f"images of {depth} channels as {self.layout}, but input {spec.name!r} is "
                f"{describe_shape(spec.shape)}",
                where=where,
                hint="layout and channels of the preprocessing" + known.get(wanted, ""),
            )

    def _chosen_size(
        self, spec: InputSpec, wanted: tuple[int | str | None, ...], where: str
    ) -> tuple[int, int]:
        given = self._preprocess.size
        sizes = (given, given) if isinstance(given, int) else given or (None, None)
        found = []
        for own, fixed in zip(sizes, wanted, strict=True):
            if own is not None and isinstance(fixed, int) and own != fixed:
                raise DataError(
                    f"the preprocessing makes images of size {own}, but input {spec.name!r} is "
                    f"{describe_shape(spec.shape)}",
                    where=where,
                    hint="leave size out: the model's is taken",
                )
            found.append(own or (fixed if isinstance(fixed, int) else USUAL_SIZE))
        return found[0], found[1]

    def _check_dtype(self, spec: InputSpec, where: str) -> None:
        plain = self._preprocess
        is_raw = plain.scale == 1 and set(plain.mean) == {0.0} and set(plain.std) == {1.0}
        if self._dtype.kind != "f" and not (is_raw and self._dtype == np.uint8):
            hint = "--preprocess raw" if self._dtype == np.uint8 else "give an .npz of that type"
            raise DataError(
                f"input {spec.name!r} is {self._dtype}, which normalised images are not",
                where=where,
                hint=hint,
            )

    def __call__(self, image: Image) -> NDArray[Any]:
        """One sample, with a batch axis of 1."""
        plain = self._preprocess
        pixels = np.asarray(self._framed(image), dtype=np.float64)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if plain.channels == "BGR":
            pixels = pixels[:, :, ::-1]
        values = (pixels * plain.scale - np.asarray(plain.mean)) / np.asarray(plain.std)
        if self.layout == "NCHW":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values[None]).astype(self._dtype)

    def _framed(self, image: Image) -> Image:
        """Resized and cropped, with the preprocessing's channels."""
        from PIL.Image import Resampling

        plain = self._preprocess
        image = image.convert("L" if plain.channels == "L" else "RGB")
        height, width = self._size
        filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
        if plain.resize is not None:
            share = plain.resize / min(image.size)
            across, down = (max(1, round(side * share)) for side in image.size)
            image = image.resize((across, down), filters[plain.interpolation])
            if across < width or down < height:
                raise DataError(
                    f"resized to {down} x {across} an image is smaller than the {height} x "
                    f"{width} that are cut out of it",
                    hint="a larger resize in the preprocessing",
                )
            left, top = (across - width) // 2, (down - height) // 2
            return image.crop((left, top, left + width, top + height))
        share = min(image.width / width, image.height / height) * (plain.crop_fraction or 1.0)
        across, down = max(1, round(share * width)), max(1, round(share * height))
        left, top = (image.width - across) // 2, (image.height - down) // 2
        image = image.crop((left, top, left + across, top + down))
        return image.resize((width, height), filters[plain.interpolation])


def _layout(shape: tuple[int | str | None, ...], depth: int) -> Literal["NCHW", "NHWC"]:
    """Where the channels are; first where the model does not tell."""
    return "NHWC" if shape[3] == depth and shape[1] != depth else "NCHW"
