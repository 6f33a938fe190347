"""How many segments and table entries the papers count, found from the graph alone.

The papers leave stem and head out by hand, so segments count whose convolutions all lie in a range
of the network's main path. Only shapes and data flow matter: the weights are random.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import networks
import unet

from graphfold.candidates import Candidate, Candidates, find_candidates
from graphfold.depth_table import depth_rows
from graphfold.drops import find_drops
from graphfold.graph import Graph
from graphfold.model import load
from graphfold.segments import main_path_convs
from graphfold.sites import ConvSite

# The stem is left out, and MobileNetV2's last convolution. LayerMerge numbers the U-Net's 3x3
# convolutions only: neither attention's projections nor shortcuts, which are all pointwise.
AFTER_STEM = slice(1, None)
NETWORKS: dict[str, tuple[Callable[[], onnx.ModelProto], slice]] = {
    "mobilenet_v2_1.0": (networks.mobilenet_v2, slice(1, 51)),
    "mobilenet_v2_1.4": (functools.partial(networks.mobilenet_v2, multiplier=1.4), slice(1, 51)),
    "resnet34": (networks.resnet34, AFTER_STEM),
    "resnet50": (networks.resnet50, AFTER_STEM),
    "vgg19": (networks.vgg19, slice(None)),
    "ddpm": (unet.ddpm_unet, AFTER_STEM),
}


@dataclass(frozen=True)
class Counted:
    """Candidates of a network, those in range, and the numbered convolutions in range."""

    all: Candidates
    found: tuple[Candidate, ...]
    convs: tuple[ConvSite, ...]

    @property
    def pairs(self) -> int:
        return len({(each.input, each.output) for each in self.found})

    @property
    def entries(self) -> int:
        return sum(len(each.choices) for each in self.found)

    @property
    def layer_only(self) -> int:
        return sum(site.removable for site in self.convs)


@functools.cache
def graph_of(name: str) -> Graph:
    return Graph(load(NETWORKS[name][0]()))


@functools.cache
def counted(name: str, compat: str | None = None) -> Counted:
    graph = graph_of(name)
    candidates = find_candidates(graph, compat=compat)
    numbered = main_path_convs(graph, candidates.sites)
    if name == "ddpm":
        numbered = [site for site in numbered if not site.pointwise]
    convs = numbered[NETWORKS[name][1]]
    found = []
    for each in candidates.found:
        inside = [site for site in each.convs if site in numbered]
        if inside and all(site in convs for site in inside):
            found.append(each)
    return Counted(candidates, tuple(found), tuple(convs))


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0", "mobilenet_v2_1.4"])
def test_mobilenet(name: str) -> None:
    found = counted(name)
    assert (found.pairs, found.entries, found.layer_only) == (171, 391, 13)


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0", "mobilenet_v2_1.4"])
def test_mobilenet_in_the_scheme_of_depth(name: str) -> None:
    found = counted(name)
    rows = depth_rows(found.all, found.found)
    assert len(rows) == len({row.key for row in rows}) == 315
    assert len({(row.input, row.output) for row in rows}) == 171


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0", "resnet34", "resnet50", "vgg19"])
def test_the_rows_of_layer_only(name: str) -> None:
    found = counted(name)
    single = [each for each in find_drops(found.all) if len(each.candidate.convs) == 1]
    assert all(each.choice.family == "identity" for each in single)
    convs = {each.candidate.convs[0] for each in single}
    assert len(single) == len(convs)
    assert len(convs & set(found.convs)) == found.layer_only


def test_resnet34() -> None:
    found = counted("resnet34")
    assert (found.pairs, found.entries, found.layer_only) == (62, 150, 29)
    assert len(depth_rows(found.all, found.found)) == 62  # every end has an activation


def test_resnet50() -> None:
    found = counted("resnet50")
    assert (found.pairs, found.entries, found.layer_only) == (124, 236, 14)


def test_resnet50_with_breaks_on_strided_convolutions() -> None:
    found = counted("resnet50", "layermerge")
    assert (found.pairs, found.entries) == (107, 192)
    ours = {(each.input.name, each.output.name) for each in counted("resnet50").found}
    theirs = {(each.input.name, each.output.name) for each in found.found}
    # Ours go on behind the three strided 3x3: with the pointwise one, and over the Add.
    assert theirs < ours
    more = [each for each in counted("resnet50").found if (each.input.name, each.output.name)
            not in theirs]  # fmt: skip
    assert sorted(each.adds for each in more) == 3 * [False] + 14 * [True]


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0", "resnet34", "vgg19"])
def test_the_other_networks_break_where_layermerge_does(name: str) -> None:
    ours, theirs = counted(name), counted(name, "layermerge")
    assert (ours.pairs, ours.entries) == (theirs.pairs, theirs.entries)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_segment_is_listed_twice(name: str) -> None:
    found = counted(name).all.found
    assert len({(each.input, each.output) for each in found}) == len(found)


def test_vgg19() -> None:
    found = counted("vgg19")
    assert (found.pairs, found.entries, found.layer_only) == (36, 68, 12)
    assert len(depth_rows(found.all, found.found)) == 36


def test_ddpm() -> None:
    found = counted("ddpm")
    assert len(found.convs) == 51
    assert (found.pairs, found.entries, found.layer_only) == (73, 98, 34)
    merged = [each for each in found.found if len(each.convs) > 1]
    assert len(merged) == 22  # one per residual block: its two convolutions
    assert all(len(each.norms) == 1 and not each.adds for each in merged)
    alone = [each for each in found.found if each.choices[-1].family == "identity"]
    assert len(alone) == 3  # the convolutions behind upsampling


def test_ddpm_where_normalisations_stay() -> None:
    graph = graph_of("ddpm")
    found = find_candidates(graph, move_norms=False)
    assert all(len(each.convs) == 1 for each in found.found)
    assert any("normalises by statistics" in each.reason for each in found.excluded)


def test_the_unet_is_the_one_that_is_published() -> None:
    proto = NETWORKS["ddpm"][0]()
    params = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    assert 35.7e6 < params < 35.8e6
    small = unet.ddpm_unet(unet.Layout(size=8, width=8, attention=(4,), groups=4))
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    one, two = (run(small, {"x": image, "t": np.array([[t]], np.float32)})[0] for t in (3.0, 700.0))
    assert one.shape == image.shape
    assert np.isfinite(one).all()
    assert np.abs(one - two).max() > 1e-3 * np.abs(one).max()  # the time step reaches the output
