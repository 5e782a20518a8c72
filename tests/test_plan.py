from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from small_networks import Concat, lively, output, random_plan

from ccp_ext import models, surgery
from ccp_ext.errors import InputError
from ccp_ext.graph import trace
from ccp_ext.plan import PruningPlan


@pytest.fixture(scope="module")
def graph():
    return trace(models.create("resnet8"), torch.randn(1, 3, 16, 16))


def test_masks_and_indices_in_any_order_make_the_same_plan(graph):
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[2, 5, 11]] = True
    plans = [
        PruningPlan.from_kept(graph, {"layer1.0.conv1": kept})
        for kept in (
            mask,
            mask.numpy(),
            [11, 2, 5],
            (5, 11, 2),
            torch.tensor([5, 2, 11]),
            np.array([5, 2, 11], dtype=np.int32),
            list(np.array([5, 2, 11])),
            list(torch.tensor([5, 2, 11])),
        )
    ]
    assert all(type(i) is int for plan in plans for i in plan.groups["layer1.0.conv1"].kept)
    assert plans[0].groups["layer1.0.conv1"].kept == (2, 5, 11)
    assert all(plan == plans[0] for plan in plans)


def test_graphs_and_plans_are_printed_as_tables_of_their_groups(graph):
    lines = repr(graph).splitlines()
    assert lines[0].startswith("ChannelGraph of ResNet on float32 [1, 3, 16, 16]: ")
    assert lines[3].split()[:5] == ["conv1", "16", "conv1", "and", "3"]
    assert lines[4].split() == ["layer1.0.conv1", "16", "layer1.0.conv1", "layer1.0.conv2"]
    assert lines[-1] == "fixed: linear[0:10] (output of the model)"
    assert len(lines) == 4 + len(graph.groups)
    plan = PruningPlan.from_kept(graph, {"layer1.0.conv1": range(8)})
    macs = f"{graph.macs():,} to {graph.macs({'layer1.0.conv1': 8}):,} MACs"
    head, *_, last = repr(plan).splitlines()
    assert macs in head and last.split() == ["layer1.0.conv1", "16", "8"]
    assert len(repr(PruningPlan.from_kept(graph, {})).splitlines()) == 1


def test_plan_names_what_stays_of_each_module(graph):
    plan = PruningPlan.from_kept(graph, {"layer2.0.conv2": [0, 3, 9]})
    # Channels 0..7 and 24..31 of the stage; 0, 3 and 25 stay with the 16 tied to the first stage.
    kept = (0, 3, *range(8, 24), 25)
    assert plan.modules["layer2.0.conv2"].out == kept
    assert plan.modules["layer2.0.conv2"].inputs is None
    assert plan.modules["layer2.0.bn2"].out == kept
    assert plan.modules["layer3.0.conv1"].inputs == kept
    assert plan.modules["layer2.0.shortcut"].channel_padding == (2, 1)
    assert plan.modules["linear"].inputs == tuple(
        [*range(16), 16, 19, *range(24, 40), 41, *range(48, 64)]
    )
    assert "layer1.0.conv1" not in plan.modules


def test_a_plan_that_keeps_everything_changes_nothing(graph):
    plan = PruningPlan.from_kept(graph, {g.name: range(g.channels) for g in graph.groups})
    assert plan.modules == {}
    assert plan.forecast["macs_before"] == plan.forecast["macs_after"]


def test_saved_plans_come_back_equal(graph, tmp_path):
    plan = random_plan(graph, record={"criterion": "l1", "options": {"seed": 3, "note": None}})
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layer1.0.conv1": []}, "'layer1.0.conv1' must keep at least one channel"),
        ({"layer1.0.conv1": torch.zeros(16, dtype=torch.bool)}, "must keep at least one channel"),
        ({"layer1.0.conv1": [0, 16]}, "'layer1.0.conv1' has channels 0 to 15; got 16"),
        ({"layer1.0.conv1": [-1]}, "got -1"),
        ({"layer1.0.conv1": [True]}, "got True"),
        ({"layer1.0.conv1": [1.0]}, "got 1.0"),
        ({"layer1.0.conv1": np.array([1.0])}, "got 1.0"),
        ({"layer1.0.conv1": [np.True_]}, r"got np.True_"),
        ({"layer1.0.conv1": 3}, "'layer1.0.conv1' takes indices or a mask; got 3"),
        ({"layer1.0.conv1": np.ones((16, 1), dtype=bool)}, r"a mask of shape \(16, 1\)"),
        ({"layer1.0.conv1": [3, 3]}, "keeps a channel twice"),
        ({"layer1.0.conv1": torch.ones(15, dtype=torch.bool)}, r"16 channels; got .* \(15,\)"),
        ({"conv7": [0]}, "no group 'conv7'"),
    ],
)
def test_bad_choices_are_refused_with_the_group_and_the_value(graph, kept, message):
    with pytest.raises(InputError, match=message):
        PruningPlan.from_kept(graph, kept)


def set_field(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "field version must be 1; got 2"),
        (["model"], None, "field model must be a string; got None"),
        (["fingerprint"], "xyz", "field fingerprint must be 64 hexadecimal digits; got 'xyz'"),
        (["groups"], [], "field groups must be an object"),
        (["groups", "conv1", "channels"], 0, r"groups\['conv1'\].channels must be .*; got 0"),
        (["groups", "conv1", "kept"], [], r"groups\['conv1'\].kept must be one or more"),
        (["groups", "conv1", "kept"], [3, 2], r"increasing order; got \[3, 2\]"),
        (["groups", "conv1", "kept"], [99], r"kept must be indices below 16; got \[99\]"),
        (["groups", "conv1", "kept"], "all", "kept must be a list of integers"),
        (["groups", "conv1", "positions"], [1], "positions must be 16 positions"),
        (["groups", "conv1", "extra"], 1, r"groups\['conv1'\] must have .* unknown: extra"),
        (["modules", "conv1", "out"], [0, True], r"modules\['conv1'\].out must be a list"),
        (["modules", "conv1"], {"sideways": [1]}, r"modules\['conv1'\] must be an object with"),
        (["modules", "conv1"], {"channel_padding": [1]}, "channel_padding must be two integers"),
        (["modules", "conv1"], {"in": [-1]}, r"modules\['conv1'\].in must be a list of integers"),
        (["inputs"], [], "field inputs must be a non-empty list"),
        (["inputs", 0, "dtype"], "float33", r"inputs\[0\].dtype must be a dtype of torch"),
        (["inputs", 0, "shape"], [1, -3], r"inputs\[0\].shape must be a list of integers"),
        (["forecast", "macs_after"], 1.5, "forecast.macs_after must be an integer"),
        (["forecast", "macs_after"], ..., "forecast must have .* missing: macs_after"),
        (["record"], 3, "field record must be an object; got 3"),
        (["record"], ..., "missing: record"),
    ],
)
def test_malformed_files_are_refused_with_file_field_and_value(
    graph, tmp_path, path, value, message
):
    content = json.loads(random_plan(graph).to_json())
    set_field(content, path, value)
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        PruningPlan.load(file)
    assert "broken.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_files_that_hold_no_plan_are_refused(tmp_path, text):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(InputError, match="broken.json"):
        PruningPlan.load(file)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        PruningPlan.load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="cannot be read"):
        PruningPlan.load(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"scores": torch.ones(2)}, r"record\['scores'\] is a Tensor, which JSON cannot hold"),
        ({"options": [{"kind": set()}]}, r"record\['options'\]\[0\]\['kind'\] is a set"),
        ({"loss": float("nan")}, r"record\['loss'\] is nan"),
        ({"loss": np.float32("inf")}, r"record\['loss'\] is inf"),
    ],
)
def test_records_that_json_cannot_hold_are_refused(graph, record, message):
    with pytest.raises(InputError, match=message):
        random_plan(graph, record=record)


def test_records_set_later_that_json_cannot_hold_are_refused(graph, tmp_path):
    plan = PruningPlan(**{**vars(random_plan(graph)), "record": {"scores": torch.ones(2)}})
    with pytest.raises(InputError, match="record holds what JSON cannot: .*Tensor"):
        plan.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_scalars_of_numpy_and_torch_in_a_record_become_numbers(graph):
    record = {"seed": np.int64(3), "share": np.float32(0.5), "t": (torch.tensor(2), np.True_, None)}
    plan = random_plan(graph, record=record)
    assert plan.record == {"seed": 3, "share": 0.5, "t": [2, True, None]}
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_a_path_that_cannot_be_written_is_named(graph, tmp_path):
    path = tmp_path / "missing" / "plan.json"
    with pytest.raises(InputError) as caught:
        random_plan(graph).save(path)
    assert f"plan {str(path)!r} cannot be written: " in str(caught.value)


# --- composition -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Concat, lambda: models.create("resnet8")])
def test_two_plans_in_one_do_what_they_do_one_after_the_other(network):
    torch.manual_seed(0)
    model, x = lively(network()), torch.randn(2, 3, 8, 8)
    first = random_plan(trace(model, x), share=0.7, seed=1)
    step = surgery.prune(copy.deepcopy(model), first)
    second = random_plan(trace(step, x), share=0.6, seed=2)
    surgery.prune(step, second)
    both = first.then(second)
    at_once = surgery.prune(copy.deepcopy(model), both)
    assert torch.equal(output(step, x), output(at_once, x))
    assert both.forecast["parameters_before"] == first.forecast["parameters_before"]
    assert both.forecast["macs_after"] == second.forecast["macs_after"]
    assert step.ccp_plan == both
    for group in both.groups.values():
        out = both.modules[group.module].out
        assert set(group.kept) == {i for i, p in enumerate(group.positions) if p in out}
    assert PruningPlan.from_json(both.to_json()) == both


def test_composition_keeps_groups_that_only_the_second_plan_prunes(graph):
    first = PruningPlan.from_kept(graph, {"layer1.0.conv1": [1, 4, 6]})
    second = PruningPlan.from_kept(graph, {"layer3.0.conv1": [0, 63]})
    both = first.then(second)
    assert {name: group.kept for name, group in both.groups.items()} == {
        "layer1.0.conv1": (1, 4, 6),
        "layer3.0.conv1": (0, 63),
    }


def test_composition_refuses_a_plan_for_channels_that_are_gone(graph):
    plan = PruningPlan.from_kept(graph, {"layer1.0.conv1": [1, 4, 15]})
    with pytest.raises(InputError, match="position 15 of module .*layer1.0.conv1.* leaves 3"):
        plan.then(plan)
