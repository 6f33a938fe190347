"""The plan's schema (version 1): reading it, checking its form, publishing its JSON Schema.

A plan states semantics: which activations and convolutions go, which segments become one
operator, where padding stands. What its names mean on a given model is `graphfold.resolve`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from graphfold.errors import PlanError, Problem

Boundary = Literal["exact", "hoist"]
Norm = Literal["after", "drop"]
Family = Literal["dense", "depthwise", "pointwise", "low_rank", "narrow", "identity"]
ActivationName = Literal["Relu", "Relu6", "HardSwish", "SiLU", "Sigmoid", "Tanh", "GELU", "Mish"]
TensorName = Annotated[str, Field(min_length=1)]
State = Annotated[int, Field(ge=0, le=1)]
Index = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LikeActivation(_Strict):
    """The same function, parameters included, as an activation site of the model."""

    like: TensorName = Field(description="output tensor of the activation site to copy")


Activation = ActivationName | LikeActivation


class ModelReference(_Strict):
    """The model that a plan was made for."""

    name: str | None = Field(default=None, description="file name, for people")
    sha256: str | None = Field(default=None, description="digest of the file and its external data")


class Segment(_Strict):
    """A single-entry single-exit subgraph that becomes one operator."""

    input: TensorName = Field(description="tensor that its first convolution reads")
    output: TensorName = Field(description="last tensor before the next activation or convolution")
    weights: Literal["merge", "regress"] = Field(
        default="merge", description="merged exactly, or fitted on data"
    )
    boundary: Boundary | None = Field(
        default=None,
        description="exact: padding stays where it is; hoist: all padding moves to the first "
        "convolution. Required for weights: merge",
    )
    family: Family | None = Field(default=None, description="what the result must be; checked")
    kernel: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="kernel size per spatial axis; checked against the merge's result"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="for family: low_rank"
    )
    width: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="for family: narrow"
    )
    activation: Activation | None = Field(
        default=None,
        description="free activation after the segment; null where the model has one there, and "
        "where none is wanted",
    )
    remove_activations: list[TensorName] | None = Field(
        default=None, description="activation sites inside to remove; all of them when left out"
    )
    remove_convs: list[TensorName] = Field(
        default_factory=list, description="conv sites inside to remove with their normalisation"
    )
    norm: Norm | None = Field(
        default=None,
        description="for segments that hold normalisations by groups: after puts the last one, "
        "with its parameters, behind the result; drop leaves all of them out",
    )

    @property
    def is_fitted(self) -> bool:
        """Whether its weights come from data."""
        return self.weights == "regress"


class AddedActivation(_Strict):
    """A free activation after a tensor that no segment ends at."""

    tensor: TensorName
    activation: Activation


class Quantize(_Strict):
    """Quantization after folding, by onnxruntime's own tools."""

    dtype: Literal["int8"] = "int8"
    calibration: Literal["minmax", "percentile", "entropy"] = Field(
        default="minmax", description="how the ranges of activations are found on --data"
    )
    percentile: float | None = Field(
        default=None,
        gt=50,
        le=100,
        description="of calibration percentile: share of values inside the range, default 99.99",
    )
    per_channel: bool = Field(
        default=True, description="a scale per output channel of each weight, instead of one"
    )
    equalise: bool = Field(
        default=False,
        description="first scale channels between convolutions whose ranges are far apart; the "
        "network in float computes the same",
    )
    keep_float: list[TensorName] = Field(
        default_factory=list, description="tensors whose operators stay in float"
    )


def _version(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1
        raise ValueError("not a version")
    return value


class Plan(_Strict):
    """A complete, self-explaining statement of what a network is to become."""

    graphfold_plan: Annotated[Literal[1], BeforeValidator(_version)] = Field(
        description="version of the plan's schema"
    )
    model: ModelReference | None = None
    segments: list[Segment] = Field(default_factory=list)
    remove_activations: list[TensorName] = Field(
        default_factory=list, description="loose activation sites; padding never moves"
    )
    remove_convs: list[TensorName] = Field(
        default_factory=list, description="loose conv sites; padding never moves"
    )
    add_activations: list[AddedActivation] = Field(default_factory=list)
    keep_blocks: list[State] | None = Field(
        default=None,
        description="short form (DepthShrinker): 1 keeps a block's activations, 0 removes them; "
        "one entry per inverted-residual block, or two more with stem and head at the ends",
    )
    act_ind: list[Index] | None = Field(
        default=None, description="short form (LayerMerge): convolutions after which a segment ends"
    )
    conv_ind: list[Index] | None = Field(
        default=None, description="short form (LayerMerge): convolutions that stay"
    )
    boundary: Boundary | None = Field(
        default=None, description="of the short forms: exact for keep_blocks, hoist for act_ind"
    )
    activation: Activation | None = Field(
        default=None, description="of the short forms: the free activation after each segment"
    )
    merge: Literal["always", "cheaper"] | None = Field(
        default=None,
        description="of keep_blocks: cheaper removes the same activations, and merges a block "
        "only where that lowers the cost (boundary: exact). Default always, as in the paper",
    )
    quantize: Quantize | None = None
    objective: dict[str, Any] | None = Field(
        default=None, description="what the plan was made for; informative"
    )

    @property
    def is_fitted(self) -> bool:
        """Whether any of its weights come from data."""
        return any(segment.is_fitted for segment in self.segments)

    @property
    def digest(self) -> str:
        """sha256 of the plan's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json", exclude_unset=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


PlanSource = Plan | Mapping[str, Any] | str | os.PathLike[str]


def json_schema() -> dict[str, Any]:
    """The plan's published JSON Schema."""
    return Plan.model_json_schema()


def read_plan(source: PlanSource) -> Plan:
    """Read a plan from a file, a mapping or a Plan, and check its form.

    Raises:
        PlanError: the file cannot be read, is not JSON, or does not follow the schema; every
            problem is listed with its JSON path and the nearest valid name.
    """
    if isinstance(source, Plan):
        return source
    if isinstance(source, Mapping):
        return _validate(source, None)
    path = Path(source)
    return _validate(_read_json(path), str(path))


def _read_json(path: Path) -> Any:
    where = str(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise PlanError([Problem("plan", "no such file")], where=where) from None
    except IsADirectoryError:
        raise PlanError([Problem("plan", "is a directory, not a plan file")], where=where) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError([Problem("plan", f"cannot be read: {error}")], where=where) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise PlanError([Problem("plan", what)], where=where) from None
    except RecursionError:
        raise PlanError([Problem("plan", "not a plan: nested too deeply")], where=where) from None


def _validate(data: Any, where: str | None) -> Plan:
    if not isinstance(data, Mapping):
        raise PlanError([Problem("$", "a plan is a JSON object")], where=where)
    try:
        plan = Plan.model_validate(dict(data))
    except ValidationError as error:
        raise PlanError(_problems(error), where=where) from None
    problems = list(_contradictions(plan))
    if problems:
        raise PlanError(problems, where=where)
    return plan


def _problems(error: ValidationError) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for detail in error.errors():
        if detail["type"] == "literal_error" and isinstance(detail["input"], Mapping):
            continue  # the object form of the same field reports what is wrong with it
        location = _without_union_branches(detail["loc"])
        path = json_path(location)
        problems.setdefault(path, _problem(path, location, dict(detail)))
    return list(problems.values())


def _problem(path: str, location: tuple[str | int, ...], detail: dict[str, Any]) -> Problem:
    given = detail["input"]
    if detail["type"] == "extra_forbidden":
        return Problem(path, "unknown key", nearest(str(location[-1]), _fields_at(location)))
    if detail["type"] == "missing":
        return Problem(path, "is required")
    if location == ("graphfold_plan",):
        return Problem(path, f"version {given!r} is not supported", "this tool reads version 1")
    if detail["type"] == "literal_error":
        expected = detail["ctx"]["expected"]
        names = [name.strip(" '") for name in expected.replace(" or ", ", ").split(",")]
        hint = nearest(str(given), names) or f"one of {expected}"
        return Problem(path, f"{given!r} is not valid", hint)
    return Problem(path, f"{detail['msg']}, not {given!r}")


def _without_union_branches(location: Iterable[str | int]) -> tuple[str | int, ...]:
    """Drop the names that pydantic adds for the members of a union."""
    return tuple(
        part
        for part in location
        if not (isinstance(part, str) and (part.startswith("literal[") or part == "LikeActivation"))
    )


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    model: type[BaseModel] = Plan
    children: dict[str, type[BaseModel]] = {
        "segments": Segment,
        "model": ModelReference,
        "quantize": Quantize,
        "add_activations": AddedActivation,
        "activation": LikeActivation,
    }
    for part in location[:-1]:
        if isinstance(part, str) and part in children:
            model = children[part]
    return list(model.model_fields)


def json_path(location: Iterable[str | int]) -> str:
    """`segments[2].boundary` for ("segments", 2, "boundary")."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text or "$"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """A "did you mean" for the closest of these names, or None where none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None


def _contradictions(plan: Plan) -> Iterable[Problem]:
    """What the schema cannot say: fields that exclude or require one another."""
    for number, segment in enumerate(plan.segments):
        yield from _segment_contradictions(f"segments[{number}]", segment)
    if (plan.act_ind is None) != (plan.conv_ind is None):
        yield Problem("act_ind", "act_ind and conv_ind belong together")
    short = plan.keep_blocks is not None or plan.act_ind is not None
    if plan.keep_blocks is not None and plan.act_ind is not None:
        yield Problem("keep_blocks", "contradicts act_ind: a plan has one short form")
    if short and plan.segments:
        yield Problem("segments", "a short form states all segments itself", "remove one of them")
    if plan.merge == "cheaper" and plan.boundary == "hoist":
        yield Problem("merge", "cheaper needs boundary exact: padding of unmerged blocks stays")
    if plan.merge is not None and plan.keep_blocks is None:
        yield Problem("merge", "belongs to keep_blocks")
    for key in ("boundary", "activation"):
        if getattr(plan, key) is not None and not short:
            yield Problem(key, "belongs to the short forms; each segment states its own")
    if plan.quantize is not None:
        yield from _quantize_contradictions(plan.quantize)
    for key in ("remove_activations", "remove_convs"):
        yield from _repeated(key, getattr(plan, key))


def _quantize_contradictions(quantize: Quantize) -> Iterable[Problem]:
    if quantize.percentile is not None and quantize.calibration != "percentile":
        yield Problem("quantize.percentile", "belongs to calibration: percentile")
    yield from _repeated("quantize.keep_float", quantize.keep_float)


def _segment_contradictions(path: str, segment: Segment) -> Iterable[Problem]:
    if segment.input == segment.output:
        yield Problem(path, f"starts and ends at the same tensor {segment.input!r}")
    if segment.is_fitted:
        yield from _fitted_contradictions(path, segment)
    elif segment.family in ("low_rank", "narrow"):
        yield Problem(f"{path}.weights", f"family {segment.family} is fitted: say regress")
    elif segment.boundary is None and segment.family != "identity":
        yield Problem(f"{path}.boundary", "is required for weights: merge", "exact or hoist")
    if segment.norm is not None and segment.family == "identity":
        yield Problem(f"{path}.norm", "what is dropped has no normalisation", "leave norm out")
    if segment.rank is not None and segment.family != "low_rank":
        yield Problem(f"{path}.rank", "belongs to family: low_rank")
    if segment.width is not None and segment.family != "narrow":
        yield Problem(f"{path}.width", "belongs to family: narrow")
    for key in ("remove_activations", "remove_convs"):
        yield from _repeated(f"{path}.{key}", getattr(segment, key) or [])


def _fitted_contradictions(path: str, segment: Segment) -> Iterable[Problem]:
    if segment.family == "identity":
        yield Problem(f"{path}.weights", "what is dropped has no weights", "leave weights out")
        return
    for key in ("boundary", "activation", "remove_activations", "norm"):
        if getattr(segment, key) is not None:
            yield Problem(f"{path}.{key}", "belongs to weights: merge")
    if segment.remove_convs:
        yield Problem(f"{path}.remove_convs", "belongs to weights: merge")
    if segment.family == "narrow":
        if segment.width is None:
            yield Problem(f"{path}.width", "is required for family: narrow")
        if segment.kernel is not None:
            yield Problem(f"{path}.kernel", "narrow keeps the kernels that are there")
    elif segment.kernel is None and segment.family != "pointwise":
        yield Problem(f"{path}.kernel", "is required for weights: regress")
    if segment.family == "low_rank" and segment.rank is None:
        yield Problem(f"{path}.rank", "is required for family: low_rank")


def _repeated(path: str, names: list[str]) -> Iterable[Problem]:
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            yield Problem(f"{path}[{number}]", f"{name!r} is named twice")
        seen.add(name)
