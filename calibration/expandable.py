"""Which convolutions are expanded: chosen by rules on their structure, or by name.

A rule is `k3` (dense convolutions of kernel 3 on every axis; `k3x1` has a size for each),
`expansions` (the pointwise convolutions that inverted-residual blocks begin with), or the name of
a convolution, which is its output tensor. Grouped convolutions match no rule: what expands them
would mix channels that they keep apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from graphfold.errors import NotExactError, Problem, ProblemsError, UsageError
from graphfold.graph import Graph, is_op
from graphfold.linear import conv_axes
from graphfold.plan import nearest
from graphfold.segments import inverted_residuals
from graphfold.sites import ConvSite, Sites, find_sites

_KERNEL = re.compile(r"k(\d+(?:x\d+)*)")
_EXPANSIONS = "expansions"


class ExpansionError(ProblemsError):
    """Convolutions that were asked for and cannot be expanded; all at once."""

    subject = "choice of convolutions"


@dataclass(frozen=True)
class Rules:
    """What is expanded.

    Attributes:
        convs: rules and names.
        every: of what rules match, in execution order, the first of so many in a row.
        skip_first, skip_last: so many at the ends of what rules match are left before that.
        leave: names of convolutions that are left.
    """

    convs: tuple[str, ...]
    every: int = 1
    skip_first: int = 0
    skip_last: int = 0
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that say nothing.

        Raises:
            UsageError: no rules, or numbers out of their ranges.
        """
        if not self.convs:
            raise UsageError("which convolutions?", hint="rules such as k3 or expansions, or names")
        if self.every < 1 or min(self.skip_first, self.skip_last) < 0:
            raise UsageError(
                f"every {self.every}, skip {self.skip_first} and {self.skip_last}",
                hint="every is 1 or more, what is skipped 0 or more",
            )


@dataclass(frozen=True)
class Left:
    """A convolution that a rule matched and that stays as it is, and why."""

    conv: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Part of a JSON document."""
        return {"conv": self.conv, "reason": self.reason}


def choose(graph: Graph, rules: Rules) -> tuple[list[ConvSite], list[Left]]:
    """The convolutions to expand, in execution order, and what rules matched beside them.

    Raises:
        ExpansionError: unknown rules and names, and named ones that cannot be expanded.
        UsageError: nothing is left to expand.
    """
    sites = find_sites(graph)
    matched, named = _match(graph, sites, rules)
    stop = len(matched) - rules.skip_last
    chosen = matched[rules.skip_first : max(stop, rules.skip_first)][:: rules.every]
    left, taken = [], set(named)
    for site in chosen:
        reason = why_not(graph, site)
        if reason is None:
            taken.add(site.name)
        elif site.name not in rules.leave:
            left.append(Left(site.name, reason))
    found = [site for site in sites.convs if site.name in taken and site.name not in rules.leave]
    if not found:
        what = f"nothing to expand: {len(matched)} convolutions match {', '.join(rules.convs)}"
        raise UsageError(
            what + "".join(f"; {each.conv}: {each.reason}" for each in left[:1]),
            hint="`graphfold inspect` lists the convolutions",
        )
    return found, left


def _match(graph: Graph, sites: Sites, rules: Rules) -> tuple[list[ConvSite], list[str]]:
    """What rules match, and what is named."""
    by_name = {site.name: site for site in sites.convs}
    problems: list[Problem] = []
    matched: set[str] = set()
    named: list[str] = []
    for rule in rules.convs:
        if rule in by_name:
            reason = why_not(graph, by_name[rule])
            if reason is not None:
                problems.append(Problem(rule, reason))
            named.append(rule)
        elif rule == _EXPANSIONS:
            blocks = inverted_residuals(graph, sites)
            matched.update(block.expand.name for block in blocks if block.expand is not None)
        elif kernel := _KERNEL.fullmatch(rule):
            sizes = tuple(int(size) for size in kernel[1].split("x"))
            matched.update(site.name for site in sites.convs if _has_kernel(site, sizes))
        else:
            problems.append(_unknown(graph, rule, by_name))
    problems += [_unknown(graph, name, by_name) for name in rules.leave if name not in by_name]
    if problems:
        raise ExpansionError(problems)
    return [site for site in sites.convs if site.name in matched], named


def _has_kernel(site: ConvSite, sizes: tuple[int, ...]) -> bool:
    wanted = sizes * len(site.kernel) if len(sizes) == 1 else sizes
    return site.groups == 1 and site.kernel == wanted


def _unknown(graph: Graph, name: str, known: dict[str, ConvSite]) -> Problem:
    value = graph.values().get(name)
    if value is not None and is_op(value.producer(), "Conv"):
        return Problem(name, "its weights are no constants of known shape")
    if value is not None:
        return Problem(name, "is not the output of a convolution", nearest(name, known))
    hint = nearest(name, known) or "k3, k3x1, expansions, or the output tensor of a convolution"
    return Problem(name, "is neither a rule nor a convolution", hint)


def why_not(graph: Graph, site: ConvSite) -> str | None:
    """Why a convolution cannot be expanded, None where it can."""
    if site.groups > 1:
        return f"it has {site.groups} groups, and an expanded one mixes all channels"
    sizes = graph.sizes(site.conv.inputs[0]) or (None,) * len(site.kernel)
    try:
        conv_axes(site.conv, site.kernel, sizes)
    except NotExactError as error:
        return error.what
    weight = graph.constant(site.conv.inputs[1])
    if weight is None or weight.dtype not in (np.float16, np.float32, np.float64):
        return f"its weights are {'unknown' if weight is None else weight.dtype}"
    return None if np.isfinite(weight).all() else "its weights are not finite"
