"""Plans for torch modules: what is matched, what trains, what is folded, what is refused."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from builders import run

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 - needs torch
from torch.nn import functional as F  # noqa: E402, N812

from graphfold.calibration import module_match  # noqa: E402
from graphfold.calibration.module_calls import Changed, Edit, record  # noqa: E402
from graphfold.calibration.modules import apply_plan, export, module_sites  # noqa: E402
from graphfold.errors import PlanError, UsageError, VerificationError  # noqa: E402
from graphfold.graph import Graph  # noqa: E402
from graphfold.model import load, to_proto  # noqa: E402
from graphfold.reference import build_reference  # noqa: E402
from graphfold.rewrite import select_passes  # noqa: E402
from graphfold.sites import find_sites  # noqa: E402

EXAMPLE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Expansion, depthwise, projection; one activation is a layer, the other a function."""

    def __init__(self, channels, wide):
        super().__init__()
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.deep = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.active = nn.ReLU6(inplace=True)

    def forward(self, x):
        y = self.active(self.norm1(self.expand(x)))
        y = F.relu6(self.norm2(self.deep(y)))
        return x + self.norm3(self.project(y))


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.blocks = nn.Sequential(Block(8, 16), Block(8, 16), Block(8, 16))
        self.drop = nn.Dropout(0.2)
        self.classes = nn.Linear(8, 4)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.classes(self.drop(x.mean((2, 3))))


class Basic(nn.Module):
    """Two residual blocks of full convolutions; one activation layer serves all of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.first.append(nn.Conv2d(6, 6, 3, padding=1))
            self.second.append(nn.Conv2d(6, 6, 3, padding=1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            y = self.relu(first(x))
            y = second(y)
            y += x
            x = self.relu(y)
        return x


def lively(module, seed=1):
    """Statistics and scales that matter."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_(0, 0.3, generator=generator)
            each.running_var.uniform_(0.3, 1, generator=generator)
            each.weight.data.uniform_(0.5, 1.5, generator=generator)
            each.bias.data.normal_(0, 0.3, generator=generator)
    return module


@pytest.fixture
def mobile():
    torch.manual_seed(0)
    return lively(Mobile())


def trained(module, steps=4):
    """The user's own loop."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    module.train()
    for _ in range(steps):
        images = torch.randn(16, 3, 9, 9, generator=generator)
        loss = F.cross_entropy(module(images), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def assert_folded(applied, count=5):
    folded = to_proto(applied.fold().folded)
    images = torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = applied.module.eval()(images).numpy()
    (found,) = run(folded, {"input": images.numpy()})
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    return folded


PLANS = {
    "exact": {"keep_blocks": [0, 1, 0], "boundary": "exact"},
    "hoist": {"keep_blocks": [0, 0, 1], "boundary": "hoist"},
    "layers": {"act_ind": [0, 3, 6, 9], "conv_ind": [1, 3, 4, 5, 6, 7, 9]},
    "with stem": {
        "keep_blocks": [0, 0, 1],
        "activation": "HardSwish",
        "remove_activations": ["/stem/stem.2/Clip_output_0"],
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_module_trains_as_the_plan_means_and_folds(mobile, plan):
    stated = PLANS[plan]
    before = {name: value.clone() for name, value in mobile.state_dict().items()}
    applied = apply_plan(mobile, {"graphfold_plan": 1, **stated}, EXAMPLE)
    assert list(applied.module.parameters()) == list(mobile.parameters())
    trained(applied.module)
    after = mobile.state_dict()
    assert not torch.equal(after["stem.1.running_mean"], before["stem.1.running_mean"])
    assert not torch.equal(after["stem.0.weight"], before["stem.0.weight"])
    folded = assert_folded(applied)
    kinds = [node.op_type for node in folded.graph.node]
    assert kinds.count("Conv") < 10
    # Without the plan the same module is what it was.
    with torch.no_grad():
        plain = mobile.eval()(EXAMPLE)
        changed = applied.module(EXAMPLE)
    assert (plain - changed).abs().max() > 1e-3


def test_a_residual_is_padded_and_a_copy_is_its_own(mobile):
    # The segment ends behind the first block's Add: its padding reaches the skip as well.
    names = [site.name for site in find_sites(Graph(export(mobile, EXAMPLE))).activations]
    stem = names[0]
    segment = {"input": stem, "output": "/blocks/blocks.1/Add_output_0", "boundary": "hoist"}
    applied = apply_plan(mobile, {"graphfold_plan": 1, "segments": [segment]}, EXAMPLE)
    assert any(edit.pads for edit in applied.module.edits.values())
    twin = copy.deepcopy(applied.module)
    trained(twin)
    with torch.no_grad():
        assert (twin(EXAMPLE) - applied.module.eval()(EXAMPLE)).abs().max() > 1e-4
    folded = assert_folded(applied)
    assert sum(node.op_type == "Conv" for node in folded.graph.node) == 5


def test_a_block_is_dropped(mobile):
    first, second = (f"/blocks/blocks.{number}/Add_output_0" for number in range(2))
    segment = {"input": first, "output": second, "family": "identity"}
    applied = apply_plan(mobile, {"graphfold_plan": 1, "segments": [segment]}, EXAMPLE)
    folded = assert_folded(applied)
    assert sum(node.op_type == "Conv" for node in folded.graph.node) == 7


def test_one_layer_that_is_called_often_is_many_sites():
    torch.manual_seed(0)
    module = Basic()
    model = export(module, EXAMPLE)
    sites = find_sites(Graph(model)).activations
    assert len(sites) == 5
    for site in sites:
        plan = {"graphfold_plan": 1, "remove_activations": [site.name]}
        applied = apply_plan(module, plan, EXAMPLE)
        (key,) = applied.module.edits
        assert key[:2] == ("relu", "relu")
        assert_folded(applied)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exporter_that_folds_and_renames_is_matched_by_contents(mobile):
    def folding(module, example):
        buffer = io.BytesIO()
        options = {"dynamo": False, "input_names": ["input"], "output_names": ["output"]}
        axes = {"input": {0: "N"}, "output": {0: "N"}}
        torch.onnx.export(module.eval(), example, buffer, dynamic_axes=axes, **options)
        return load(buffer.getvalue())

    graph = Graph(folding(mobile, (EXAMPLE,)))
    assert not any(node.op_type == "BatchNormalization" for node in graph.ir)
    found = module_match.match(graph, find_sites(graph), record(mobile, (EXAMPLE,)))
    assert not found.unmatched
    for node, pair in found.weighted.items():
        assert node.name.strip("/").split("/")[-2] == pair.event.path.split(".")[-1] or (
            pair.event.path == "stem.0"
        )
        assert pair.is_folded
    assert len(found.activations) == 7
    plan = {"graphfold_plan": 1, **PLANS["hoist"]}
    applied = apply_plan(mobile, plan, EXAMPLE, export=folding)
    trained(applied.module)
    assert_folded(applied)


def test_a_network_fresh_from_its_constructor_is_matched():
    # Blocks that start as zero make equal tensors everywhere, and exporters store equal
    # statistics once: only the weights tell the calls apart.
    torch.manual_seed(0)
    module = Mobile()
    for block in module.blocks:
        nn.init.zeros_(block.norm3.weight)
    applied = apply_plan(module, {"graphfold_plan": 1, **PLANS["hoist"]}, EXAMPLE)
    trained(applied.module, steps=12)
    assert_folded(applied)


def test_masks_can_be_put_where_the_sites_are(mobile):
    found = module_sites(mobile, EXAMPLE)
    assert found.missing == ()
    assert [key[:2] for key in found.activations.values()][:3] == [
        ("stem.2", "hardtanh"),
        ("blocks.0.active", "hardtanh"),
        ("blocks.0", "relu6"),
    ]
    mask = nn.Parameter(torch.ones(()))
    edits = {
        key: Edit(mix=lambda before, after: mask * after + (1 - mask) * before)
        for key in found.activations.values()
    }
    masked = Changed(mobile, edits).eval()
    mobile.eval()
    with torch.no_grad():
        assert torch.equal(masked(EXAMPLE), mobile(EXAMPLE))
        mask.zero_()
        plan = {"graphfold_plan": 1, "remove_activations": list(found.activations)}
        linear = apply_plan(mobile, plan, EXAMPLE).module.eval()
        torch.testing.assert_close(masked(EXAMPLE), linear(EXAMPLE))
    masked(EXAMPLE).sum().backward()
    assert mask.grad.abs() > 0


def test_scopes_of_both_exporters():
    class Told:
        def __init__(self, name, scopes=None):
            self.name = name
            self.metadata_props = {} if scopes is None else {"pkg.torch.onnx.name_scopes": scopes}

    scope = module_match._scope
    assert scope(Told("n", "['', 'features', 'features.0', 'features.0.1', 'conv2d']")) == (
        "features.0.1"
    )
    assert scope(Told("/features/features.1/conv/conv.0/conv.0.0/Conv")) == "features.1.conv.0.0"
    assert scope(Told("/blocks/blocks.0/expand/Conv")) == "blocks.0.expand"
    assert scope(Told("Conv_12")) is None
    assert scope(Told("n", "not a list")) is None


class Odd(nn.Module):
    """Activations that no single call is, or that have parameters."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.three = nn.Conv2d(4, 4, 1)
        self.slopes = nn.PReLU(4)

    def forward(self, x):
        y = self.one(x)
        y = self.two(y * torch.sigmoid(y))
        return self.three(self.slopes(y))


def test_what_cannot_be_done_in_a_module_is_said():
    module = Odd()
    first, second = find_sites(Graph(export(module, EXAMPLE))).activations
    assert (first.kind, second.kind) == ("SiLU", "PRelu")
    plan = {"graphfold_plan": 1, "remove_activations": [first.name]}
    with pytest.raises((PlanError, VerificationError), match=r"differs|not found"):
        apply_plan(module, plan, EXAMPLE)
    added = {"tensor": "/one/Conv_output_0", "activation": {"like": second.name}}
    plan = {
        "graphfold_plan": 1,
        "remove_activations": [first.name],
        "add_activations": [added],
    }
    with pytest.raises(PlanError, match="has parameters of its own"):
        apply_plan(module, plan, EXAMPLE)
    fitted = {"input": "input", "output": "/two/Conv_output_0", "weights": "regress"}
    plan = {"graphfold_plan": 1, "segments": [{**fitted, "kernel": [1, 1]}]}
    with pytest.raises(UsageError, match="graphfold finetune takes such a plan"):
        apply_plan(module, plan, EXAMPLE)


def test_all_that_is_missing_is_listed(mobile):
    def other(module, example):
        # Another network than the one that runs.
        torch.manual_seed(9)
        return export(lively(Mobile(), seed=8), example)

    def renamed(module, example):
        proto = to_proto(other(module, example))
        for node in proto.graph.node:
            node.name = ""
            for names in (node.input, node.output):
                names[:] = [name.replace("weight", "w") for name in names]
        for item in proto.graph.initializer:
            item.name = item.name.replace("weight", "w")
        return load(proto)

    plan = {"graphfold_plan": 1, **PLANS["exact"]}
    with pytest.raises(PlanError) as caught:
        apply_plan(mobile, plan, EXAMPLE, export=renamed)
    assert len(caught.value.problems) >= 11
    assert "is not found in the module" in str(caught.value)
    with pytest.raises(VerificationError, match="differs from the plan's reference network"):
        apply_plan(mobile, plan, EXAMPLE, export=other)


def test_an_export_is_the_module_and_leaves_it_as_it_was(mobile):
    mobile.train()
    model = export(mobile, EXAMPLE)
    assert mobile.training
    reference = build_reference(model, None, select_passes()).model
    with torch.no_grad():
        expected = mobile.eval()(EXAMPLE).numpy()
    (found,) = run(to_proto(reference), {"input": EXAMPLE.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    names = {item.name for item in to_proto(model).graph.initializer}
    assert {"blocks.0.expand.weight", "blocks.0.norm1.running_var"} <= names
