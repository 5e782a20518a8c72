from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from ccp_ext import measure, models, surgery
from ccp_ext.allocation import allocate
from ccp_ext.allocation.latency import LatencyTable, LayerTimes, _Staircase
from ccp_ext.errors import InputError
from ccp_ext.graph import trace
from ccp_ext.plan import PruningPlan


def test_macs_are_those_of_the_textbook():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )
    one = 16 * 8 * 3 * 9 + 16 * 8 * 9 + 8 * 16 * 5
    assert measure.macs(model, torch.randn(1, 3, 8, 8)) == one
    assert measure.macs(model, [torch.randn(4, 3, 8, 8)]) == 4 * one


def test_parameters_count_a_shared_one_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert measure.parameters(model) == 40
    model[1].weight = model[0].weight
    assert measure.parameters(model) == 24


def test_measuring_keeps_training_flags_and_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    measure.macs(model, torch.randn(2, 3, 4, 4))
    measure.latency(model, torch.randn(2, 3, 4, 4), repeats=2, warmup=1)
    assert [m.training for m in model] == [True, True, False]
    assert model[1].num_batches_tracked == 0


def test_latency_sums_up_the_repeats_without_gradients():
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(torch.is_grad_enabled() or self.training)
            return x

    result = measure.latency(Counted(), torch.zeros(1), repeats=7, warmup=2)
    assert calls == [False] * 9
    assert result.repeats == 7
    assert 0 < result.low <= result.median <= result.high


@pytest.mark.gpu
def test_latency_on_a_gpu_waits_for_the_kernels(cuda):
    x = torch.randn(4096, 4096, device=cuda)
    result = measure.latency(nn.Linear(4096, 4096, device=cuda), x, repeats=10)
    # 69 GMACs take longer than a launch on any GPU.
    assert result.low > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeats": 1}, "repeats must be 2 or more, got 1"), ({"warmup": -1}, "warmup .* got -1")],
)
def test_bad_latency_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        measure.latency(nn.Identity(), torch.zeros(1), **options)


# --- latency tables ----------------------------------------------------------------------------


def tiles(module, arguments):
    """A made-up machine: a layer takes a millisecond for each tile of 4 outputs by 4 inputs."""
    total = 0.0
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            out, inputs = layer.weight.shape[:2]
            total += -(-out // 4) * -(-inputs // 4)
    return total


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12, affine=False)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.second = nn.Conv2d(12, 10, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def chain():
    model = Chain().eval()
    example = torch.randn(2, 3, 6, 6)
    graph = trace(model, example)
    return model, graph, example


@pytest.fixture
def table(chain):
    return measure.latency_table(*chain, widths=4, timer=tiles)


def test_the_table_is_a_staircase_up_to_the_next_width_measured(chain, table):
    model, graph, example = chain
    assert table.layers["second"].out == (4, 8, 10) and table.layers["second"].inputs == (4, 8, 12)
    assert table.layers["norm"].inputs == (0,)
    first, second = (g.name for g in graph.groups)
    for keep in ({first: 12, second: 10}, {first: 5, second: 8}, {first: 4, second: 9}):
        kept = {name: range(count) for name, count in keep.items()}
        slim = surgery.prune(Chain().eval(), PruningPlan.from_kept(graph, kept))
        assert table.predict(graph, keep) == pytest.approx(tiles(slim, ()))
        # The same table serves the pruned model.
        assert table.predict(trace(slim, example)) == pytest.approx(tiles(slim, ()))
    assert table.predict(graph, {first: 5}) == table.predict(graph, {first: 8})
    assert table.predict(graph) == table.milliseconds == tiles(model, ())


def test_wide_sides_are_measured_at_wider_steps(chain, monkeypatch):
    monkeypatch.setattr(measure.widths, "MOST_STEPS", 3)
    layers = measure.latency_table(*chain, widths=2, timer=tiles).layers
    assert layers["first"].out == (4, 8, 12) and layers["head"].inputs == (4, 8, 10)


def test_what_is_not_in_layers_is_taken_to_shrink_with_them(chain):
    whole = measure.latency_table(
        *chain,
        widths=4,
        timer=lambda m, x: 2 * tiles(m, x) if isinstance(m, Chain) else tiles(m, x),
    )
    graph = chain[1]
    keep = {g.name: 4 for g in graph.groups}
    plain = measure.latency_table(*chain, widths=4, timer=tiles)
    assert whole.predict(graph, keep) == pytest.approx(2 * plain.predict(graph, keep))


class Curve:
    """Every channel costs the same."""

    def __init__(self, channels):
        self.counts = range(channels + 1)
        self.objective = self.lower_bound = [float(r) for r in self.counts]


@pytest.mark.parametrize("with_curves", [False, True])
def test_latency_budgets_are_met_at_the_edges_of_the_steps(chain, table, with_curves):
    graph = chain[1]
    curves = {g.name: Curve(g.channels) for g in graph.groups} if with_curves else None
    found = allocate(graph, curves=curves, latency=0.6, latency_table=table)
    assert found.budget == pytest.approx(0.6 * table.milliseconds)
    assert found.achieved == table.predict(graph, found.keep) <= found.budget
    same = allocate(
        graph, curves=curves, latency=f"{0.6 * table.milliseconds!r}ms", latency_table=table
    )
    assert same.keep == found.keep
    if with_curves:
        # Nobody keeps 5 channels where 8 take as long.
        assert all(count in (4, 8, graph[n].channels) for n, count in found.keep.items())
        best = min(
            22 - a - b
            for a in range(1, 13)
            for b in range(1, 11)
            if table.predict(graph, dict(zip(found.keep, (a, b), strict=True))) <= found.budget
        )
        assert found.lower_bound <= best == found.objective


def test_a_time_that_falls_with_the_width_is_respected(chain, table):
    """63 channels may be slower than 64: then 64 are kept."""
    graph = chain[1]
    slow = table.layers["second"]
    rows = [list(row) for row in slow.milliseconds]
    rows[1] = [time + 50 for time in rows[1]]
    odd = LayerTimes(slow.out, slow.inputs, tuple(map(tuple, rows)))
    bumpy = LatencyTable(**{**vars(table), "layers": {**table.layers, "second": odd}})
    curves = {g.name: Curve(g.channels) for g in graph.groups}
    second = graph.groups[1].name
    found = allocate(graph, curves=curves, latency=0.8, latency_table=bumpy)
    assert found.keep[second] not in range(5, 9)
    assert found.achieved <= found.budget


def test_the_least_time_from_some_widths_on_is_that_of_the_grid():
    grid = ((5.0, 3.0), (4.0, 9.0), (7.0, 6.0))
    staircase = _Staircase(LayerTimes((4, 8, 12), (2, 6), grid), scale=1.0)
    assert [[float(staircase.at_least(o, i)) for i in (2, 6)] for o in (4, 8, 12)] == [
        [3.0, 3.0],
        [4.0, 6.0],
        [6.0, 6.0],
    ]


def test_a_table_survives_its_file(table, tmp_path):
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def test_a_real_table_has_times_for_every_layer():
    model = models.create("resnet8").eval()
    example = torch.randn(1, 3, 16, 16)
    graph = trace(model, example)
    table = measure.latency_table(model, graph, example, widths=[8, 16], repeats=2, warmup=1)
    assert set(table.layers) == {layer.module for layer in graph.layers}
    keep = {g.name: 8 for g in graph.groups}
    assert table.predict(graph, keep) > 0 and table.predict(graph) == pytest.approx(
        table.milliseconds
    )
    assert table.torch == torch.__version__ and table.dtype == "float32"
    assert table.shapes == ((1, 3, 16, 16),) and table.device


def test_bad_tables_and_widths_are_named(chain, table, tmp_path):
    model, graph, example = chain
    with pytest.raises(InputError, match="step of the widths must be >= 1; got 0"):
        measure.latency_table(model, graph, example, widths=0)
    with pytest.raises(InputError, match="widths must be integers >= 1; got -4"):
        measure.latency_table(model, graph, example, widths=[-4])
    with pytest.raises(InputError, match=r"unknown layers \['third'\]"):
        measure.latency_table(model, graph, example, widths={"third": [4]})
    with pytest.raises(InputError, match="latency and latency_table must be given together"):
        allocate(graph, latency=0.5)
    for latency in (1.5, 3, "5", "xms", "1e9ms", float("nan")):
        with pytest.raises(InputError, match="latency must be a fraction"):
            allocate(graph, latency=latency, latency_table=table)
    with pytest.raises(InputError, match="smallest that can be reached"):
        allocate(graph, latency=0.01, latency_table=table)
    with pytest.raises(InputError, match="needs increasing widths"):
        LayerTimes((4, 2), (0,), ((1.0,), (2.0,)))
    other = trace(models.create("resnet8").eval(), torch.randn(1, 3, 16, 16))
    with pytest.raises(InputError, match="layer 'conv1' of the graph was not measured"):
        allocate(other, latency=0.5, latency_table=table)
    for text in ("", "[]", '{"version": 2}', '{"version": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match="bad.json.* malformed"):
            LatencyTable.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="missing.json"):
        LatencyTable.load(tmp_path / "missing.json")


def test_resources_are_the_time_and_the_peak_above_the_start():
    if measure.usage._status_bytes("VmHWM") is None:
        pytest.skip("needs Linux's /proc")
    with measure.resources("cpu") as used:
        time.sleep(0.05)
        large = torch.ones(16 * 2**20)  # 64 MiB
        del large
    assert used.seconds >= 0.05 and 60 < used.mebibytes < 100
    with measure.resources("cpu") as after:
        pass
    assert after.mebibytes < 10 and after.seconds < used.seconds
    assert used.then(after).seconds == used.seconds + after.seconds
    assert used.then(after).mebibytes == used.mebibytes
    assert used.then(measure.Resources(1.0, None)).mebibytes is None


def test_memory_that_the_allocator_keeps_does_not_hide_a_peak():
    if measure.usage._status_bytes("VmHWM") is None:
        pytest.skip("needs Linux's /proc")
    for _ in range(2):
        blocks = [torch.ones(2**12) for _ in range(2**12)]  # 64 MiB in pieces of 16 KiB
        last = blocks[-1]  # keeps the rest below it from being given back
        del blocks
    with measure.resources("cpu") as used:
        blocks = [torch.ones(2**12) for _ in range(2**12)]
    assert len(last) and len(blocks) and 60 < used.mebibytes < 100


@pytest.mark.gpu
def test_resources_on_a_gpu(cuda):
    held = torch.ones(2**20, device=cuda)  # 4 MiB
    before = torch.cuda.memory_allocated() / 2**20  # other tests' handles keep memory, too
    with measure.resources(cuda) as used:
        large = torch.ones(16 * 2**20, device=cuda)
        del large
    assert before >= 4 and before + 64 <= used.mebibytes < before + 66 and len(held)
    assert "GPU" in measure.memory_kind(cuda)
