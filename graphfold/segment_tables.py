"""What `inspect` tells of segments: which convolutions could become one, at what cost, or why not.

Also what the merges that lossless folding refuses would cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphfold import tables
from graphfold.tables import Table, make_table

if TYPE_CHECKING:
    from graphfold.candidates import Candidate, Candidates, Exclusion
    from graphfold.choices import Choice
    from graphfold.cost import Cost
    from graphfold.runs import Alternative
    from graphfold.shapes import TensorShape

# Without --segments a table shows no more rows than this.
_SHORT = 15


@dataclass(frozen=True)
class InspectedSegment:
    """A candidate with its multiply-accumulates per image, None where sizes are not known.

    Attributes:
        candidate: the segment.
        macs: of its convolutions as they are.
        merged_macs: of each of its choices.
    """

    candidate: Candidate
    macs: int | None
    merged_macs: tuple[int | None, ...]

    @property
    def saved(self) -> int:
        """What merging all of it saves; 0 where that is not known."""
        merged = self.merged_macs[0]
        return 0 if self.macs is None or merged is None else self.macs - merged

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        each = self.candidate
        return {
            "input": each.input.name,
            "output": each.output.name,
            "convs": [site.name for site in each.convs],
            "activations": [site.name for site in each.activations],
            "joins": each.adds,
            "norm": each.norm,
            "macs": self.macs,
            "choices": [
                _choice_json(choice, macs)
                for choice, macs in zip(each.choices, self.merged_macs, strict=True)
            ],
        }


def _choice_json(choice: Choice, macs: int | None) -> dict[str, Any]:
    return {
        "kernel": list(choice.kernel),
        "stride": list(choice.stride),
        "family": choice.family,
        "removed_convs": list(choice.removed_convs),
        "macs": macs,
    }


def inspect_segments(
    candidates: Candidates, cost: Cost, shapes: Mapping[str, TensorShape]
) -> tuple[InspectedSegment, ...]:
    """All candidates with what they cost, in order.

    Args:
        candidates: of the network.
        cost: of the same network.
        shapes: of its tensors, by name.
    """
    macs = {node.output: node.macs for node in cost.nodes}
    return tuple(_inspected(each, macs, shapes) for each in candidates.found)


def _inspected(
    candidate: Candidate, macs: Mapping[str, int | None], shapes: Mapping[str, TensorShape]
) -> InspectedSegment:
    present = [macs.get(site.name) for site in candidate.convs]
    known = [each for each in present if each is not None]
    return InspectedSegment(
        candidate,
        sum(known) if len(known) == len(present) else None,
        tuple(_merged_macs(candidate, choice, shapes) for choice in candidate.choices),
    )


def _merged_macs(
    candidate: Candidate, choice: Choice, shapes: Mapping[str, TensorShape]
) -> int | None:
    if choice.family == "identity":
        return 0
    output = shapes.get(candidate.output.name or "") or ()
    source = shapes.get(candidate.input.name or "") or ()
    inside = 1 if choice.family == "depthwise" else source[1] if len(source) > 1 else None
    sizes = [size for size in (*output[1:], inside) if isinstance(size, int)]
    if not output or len(sizes) != len(output):
        return None
    return math.prod(sizes) * math.prod(choice.kernel)


def segment_table(segments: Sequence[InspectedSegment], *, whole: bool) -> Table:
    """Segments of several convolutions; those that save most, unless all are asked for."""
    several = [each for each in segments if len(each.candidate.convs) > 1]
    shown = segments if whole else sorted(several, key=lambda each: -each.saved)[:_SHORT]
    entries = sum(len(each.candidate.choices) for each in segments)
    title = f"Segments that one convolution may replace ({len(segments)}, {entries} kernels in all)"
    notes = []
    if len(shown) < len(segments):
        notes.append(
            f"The {len(shown)} that save most of {len(several)} with several convolutions; "
            "--segments shows all, --json has everything."
        )
    count = sum(each.candidate.norm is not None for each in segments)
    if count:
        notes.append(f"{count} hold normalisations by groups: a plan says what becomes of them.")
    note = " ".join(notes) or None
    columns = ("input", "output", "kernels", "convs", "acts", "MACs now", "merged")
    rows = [_segment_row(each) for each in shown]
    return make_table(title, columns, rows, text_columns=3, note=note)


def _segment_row(segment: InspectedSegment) -> tuple[str | None, ...]:
    each = segment.candidate
    return (
        each.input.name or "",
        each.output.name or "",
        ", ".join(dict.fromkeys(map(_kernel, each.choices))),
        str(len(each.convs)),
        str(len(each.activations)),
        tables.count(segment.macs),
        tables.count(segment.merged_macs[0]),
    )


def _kernel(choice: Choice) -> str:
    if choice.family == "identity":
        return "none"
    size = tables.kernel(choice.kernel)
    return f"{size} depthwise" if choice.family == "depthwise" else size


def exclusion_table(excluded: Sequence[Exclusion], *, whole: bool) -> Table:
    """Where segments end, by reason."""
    pairs = [(each.reason, f"{each.input} -> {each.output}") for each in excluded]
    rows: Iterable[tuple[str, str, str]]
    if whole:
        rows = [(reason, name, "1") for reason, name in pairs]
    else:
        groups = tables.grouped(pairs)
        rows = [(reason, tables.first_names(names, 1), str(len(names))) for reason, names in groups]
        rows = _shortened(rows)
    title = f"Segments that reach no further ({len(excluded)})"
    return make_table(title, ("reason", "from -> to", "count"), list(rows), text_columns=2)


def _shortened(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    if len(rows) <= _SHORT:
        return list(rows)
    rest = rows[_SHORT:]
    total = sum(int(row[-1]) for row in rest)
    return [*rows[:_SHORT], (f"{len(rest)} other reasons", "", str(total))]


def alternatives_table(alternatives: Sequence[Alternative], *, whole: bool) -> Table:
    """Loose linear runs that stay, and what one convolution in their place would cost."""
    shown = alternatives if whole else alternatives[:_SHORT]
    rows = list(_alternative_rows(shown))
    note = "Merging these raises cost; --allow-growth merges them all the same."
    if len(shown) < len(alternatives):
        note = f"{len(alternatives) - len(shown)} more with --segments. {note}"
    title = f"Linear runs that stay ({len(alternatives)})"
    columns = ("input", "output", "kernel", "convs", "operations now", "merged", "change")
    return make_table(title, columns, rows, text_columns=3, note=note)


def _alternative_rows(alternatives: Iterable[Alternative]) -> Iterator[tuple[str | None, ...]]:
    for each in alternatives:
        yield (
            each.input,
            each.output,
            tables.kernel(each.kernel),
            str(len(each.convs)),
            tables.count(each.present.macs),
            tables.count(each.merged.macs),
            tables.change(each.present.macs, each.merged.macs),
        )
