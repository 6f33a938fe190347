"""What may stand in each place of a network when weights are fitted: rows of tables to be.

- narrow: fewer inner channels, at several widths.
- identity: nothing, where both ends have the same shape.
- dense: one convolution, of every kernel that a merge could have; and of kernel 1 (pointwise).
- depthwise: one filter per channel, where the numbers of channels are equal.
- low_rank: a convolution to few channels and a pointwise one behind it.

Long segments are left out: a fit over many activations explains little, and two short ones
together are looked at anyway. So is what can never pay by its size, and what has too many features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from graphfold.calibration.channels import Inner
from graphfold.calibration.nodetimes import step_of
from graphfold.calibration.places import Key, Segment
from graphfold.calibration.snippets import Snippet, Snippets
from graphfold.calibration.workbench import LARGEST_FEATURES, Replacement, Workbench
from graphfold.candidates import Candidate, Candidates
from graphfold.choices import Choice
from graphfold.cuts import CutLayout, choice_row
from graphfold.errors import Problem, UsageError
from graphfold.measures import Row
from graphfold.plan import Family, nearest

if TYPE_CHECKING:
    import onnx_ir as ir

FAMILIES: tuple[Family, ...] = get_args(Family)
# One residual block of any kind has at most so many convolutions on the way through.
MOST_CONVS = 4
# Of the channels that are there.
_WIDTHS = (7 / 8, 3 / 4, 1 / 2, 1 / 4)
_RANKS = (1 / 2, 1 / 4)
_RANK_STEP = 8
# Of what a segment costs in multiply-adds and traffic: a dense convolution is quicker for its size
# than depthwise ones are, but not by more; the others are there to be quick.
_DEAREST_DENSE = 1.5
_DEAREST: Mapping[Family, float] = {"low_rank": 0.75, "depthwise": 0.75}


@dataclass(frozen=True)
class Alternative:
    """One thing that may stand in a place.

    Attributes:
        row: its key in tables.
        key: of the place in a workbench.
        replacement: what stands there.
        snippet: what its latency is measured on; None for narrow and identity.
    """

    row: Row
    key: Key
    replacement: Replacement
    snippet: Snippet | None = None

    @property
    def name(self) -> str:
        """Tells it from all others of the network."""
        return f"{self.key[0]} > {self.key[1]}: {self.replacement}"


def check_families(names: Iterable[str]) -> tuple[Family, ...]:
    """Names of families as such.

    Raises:
        UsageError: one that there is not, or none at all.
    """
    found: list[Family] = []
    for name in names:
        known = next((family for family in FAMILIES if family == name), None)
        if known is None:
            hint = nearest(name, FAMILIES) or "one of " + ", ".join(FAMILIES)
            raise UsageError(f"--families: {name!r} is not known", hint=hint)
        found.append(known)
    if not found:
        raise UsageError("--families names none", hint="some of " + ", ".join(FAMILIES))
    return tuple(family for family in FAMILIES if family in found)


class Alternatives:
    """Lists what may stand in the places of a network.

    Args:
        candidates: of the model itself, whose tensors rows name.
        cuts: its steps.
        bench: the model folded.
        snippets: of the model.
        unchanged: snippets of all steps, where they are known already.
    """

    def __init__(
        self,
        candidates: Candidates,
        cuts: CutLayout,
        bench: Workbench,
        snippets: Snippets,
        unchanged: Sequence[Snippet] | None = None,
    ) -> None:
        self._candidates = candidates
        self._cuts = cuts
        self._bench = bench
        self._snippets = snippets
        self._unchanged = unchanged or [snippets.unchanged(step) for step in cuts.steps]
        self._holder: Mapping[ir.Node, int] = {
            node: number for number, step in enumerate(cuts.steps) for node in step.nodes
        }

    def found(
        self, families: Sequence[Family] = FAMILIES, longest: int = MOST_CONVS
    ) -> Iterator[Alternative]:
        """All of some families.

        Args:
            families: which.
            longest: convolutions that a segment may hold.
        """
        if "narrow" in families:
            yield from self.narrow()
        for candidate in self._candidates.found:
            key = candidate.input.name or "", candidate.output.name or ""
            place = self._bench.segments.get(key)
            if place is None or len(candidate.convs) > longest or candidate.norms:
                continue
            if "identity" in families and place.same:
                ones = (1,) * len(place.stride)
                names = tuple(site.name for site in candidate.convs)
                row = choice_row(candidate, Choice(ones, ones, "identity", names, 0.0))
                yield Alternative(row, key, Replacement("identity"))
            yield from self._convolutions(candidate, place, families)

    def narrow(self) -> Iterator[Alternative]:
        """Widths of all inner channels that lie between two cuts."""
        for key, place in self._bench.inner.items():
            if isinstance(self._cuts.layout.span(*key), Problem):
                continue
            for width in widths_of(place):
                row = Row(
                    input=key[0], output=key[1], family="narrow", weights="regress", width=width
                )
                yield Alternative(row, key, Replacement("narrow", width))

    def _convolutions(
        self, candidate: Candidate, place: Segment, families: Sequence[Family]
    ) -> Iterator[Alternative]:
        numbers = dict.fromkeys(
            self._holder[node] for node in candidate.nodes if node in self._holder
        )
        replaced = [self._unchanged[number] for number in numbers]
        for row, replacement in _convolutions(candidate, place):
            if _asked_for(replacement) not in families:
                continue
            if not _can_be_fitted(place, replacement.kernel or ()):
                continue
            snippet = self._snippets.fitted(
                candidate, replacement.family, row.kernel or (), replacement.rank
            )
            limit = _DEAREST.get(replacement.family, _DEAREST_DENSE)
            if snippet.cost > limit * sum(item.cost for item in replaced):
                continue
            if replacement.family == "low_rank" and not self._is_smaller(
                candidate, replacement, snippet
            ):
                continue
            yield Alternative(row, place.key, replacement, snippet)

    def _is_smaller(self, candidate: Candidate, replacement: Replacement, snippet: Snippet) -> bool:
        """Whether a map of low rank costs less than one of full rank, which is better."""
        full = self._snippets.fitted(candidate, "dense", replacement.kernel or (), None)
        return snippet.cost < full.cost


def _can_be_fitted(place: Segment, kernel: Sequence[int]) -> bool:
    features = place.channels[0] * math.prod(kernel)
    return features <= LARGEST_FEATURES and place.takes(kernel)


def _asked_for(replacement: Replacement) -> Family:
    is_pointwise = replacement.family == "dense" and set(replacement.kernel or ()) <= {1}
    return "pointwise" if is_pointwise else replacement.family


def _convolutions(candidate: Candidate, place: Segment) -> Iterator[tuple[Row, Replacement]]:
    """All convolutions; those that a merge could make have the same keys as merged ones.

    Of depthwise ones and maps of low rank only the smallest kernel above 1 is tried: they are for
    speed, and larger ones are as slow as what they replace.
    """
    known: dict[tuple[Family, tuple[int, ...]], None] = {}
    for choice in candidate.choices:
        if choice.family in ("dense", "depthwise"):
            known[choice.family, choice.kernel] = None
            row = choice_row(candidate, choice).model_copy(update={"weights": "regress"})
            yield row, Replacement(choice.family, kernel=choice.kernel)

    def row_of(family: Family, kernel: tuple[int, ...], rank: int | None = None) -> Row:
        return Row(
            input=place.key[0],
            output=place.key[1],
            kernel=kernel,
            stride=place.stride,
            family=family,
            weights="regress",
            rank=rank,
        )

    ones = (1,) * len(place.stride)
    larger = [kernel for _, kernel in known if kernel != ones]
    smallest = min(larger, key=math.prod, default=ones)
    if ("dense", ones) not in known:
        yield row_of("pointwise", ones), Replacement("pointwise", kernel=ones)
    if place.channels[0] == place.channels[1] and ("depthwise", smallest) not in known:
        yield row_of("depthwise", smallest), Replacement("depthwise", kernel=smallest)
    for kernel in dict.fromkeys([smallest, ones]):
        for rank in ranks_of(place):
            yield row_of("low_rank", kernel, rank), Replacement("low_rank", None, kernel, rank)


def widths_of(place: Inner) -> list[int]:
    """Numbers of channels that vector units like, falling."""
    step = step_of(place.channels)
    wanted = [max(step, round(place.channels * share / step) * step) for share in _WIDTHS]
    return [width for width in dict.fromkeys(wanted) if width < place.channels]


def ranks_of(place: Segment) -> list[int]:
    """Ranks of maps through fewer channels, falling."""
    channels = min(place.channels)
    wanted = [max(1, round(channels * share / _RANK_STEP)) * _RANK_STEP for share in _RANKS]
    return [rank for rank in dict.fromkeys(wanted) if rank < channels]


def largest_kernels(alternatives: Iterable[Alternative]) -> dict[Key, tuple[int, ...]]:
    """By segment, the kernel whose moments serve all others: the largest along every axis."""
    found: dict[Key, tuple[int, ...]] = {}
    for each in alternatives:
        kernel = each.replacement.kernel
        if kernel is not None:
            known = found.get(each.key, kernel)
            found[each.key] = tuple(max(pair) for pair in zip(known, kernel, strict=True))
    return found
