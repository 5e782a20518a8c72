"""The HTML page of a run and of a comparison: complete, self-contained, and right in a browser."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from ccp_ext import cli, models, ops, trace
from ccp_ext.compare.jobs import Job
from ccp_ext.cost import Cost
from ccp_ext.criteria import gathering
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.finetune.history import EpochRecord, epoch_log
from ccp_ext.plan import PruningPlan
from ccp_ext.report import curves, page, snapshot, svg
from ccp_ext.statistics import collect

VOID = {"meta", "img", "br", "wbr", "circle", "line", "polyline", "polygon", "path"}


def command(name, inputs, output, *options):
    paths = ("--weights", inputs / "weights.th", "--data", inputs / "data.npz", "--output", output)
    words = (name, "--quiet", "--model", "resnet8", *paths, "--images", 48, *options)
    return [str(word) for word in (*words, "--repair-images", 48, "--device", "cpu")]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The folder of `ccp prune` with its page."""
    output = tmp_path_factory.mktemp("page") / "run"
    options = ("--macs", 0.5, "--criterion", "ccp", "--epochs", 2)
    assert cli.main(command("prune", inputs, output, *options)) == 0
    assert cli.main(["report", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def comparison(inputs, tmp_path_factory):
    """The folder of `ccp compare`, which writes its page."""
    output = tmp_path_factory.mktemp("page") / "comparison"
    arms = "ccp,ccp:curvature=sampled:temperature=4:diagonal"
    options = ("--criteria", arms, "--macs", "0.7,0.5", "--seeds", "0,1", "--repair", "none")
    assert cli.main(command("compare", inputs, output, *options)) == 0
    return output


@pytest.fixture(scope="module")
def tuned(inputs, tmp_path_factory):
    """The folder of `ccp compare` with fine-tuned rows: two budgets, three arms, two seeds."""
    output = tmp_path_factory.mktemp("page") / "tuned"
    options = ("--criteria", "l1,bn-scale", "--macs", "0.7,0.5", "--seeds", "0,1", "--epochs", 3)
    repair = ("--repair", "none,finetune")
    assert cli.main(command("compare", inputs, output, *options, *repair)) == 0
    return output


@pytest.fixture(params=["run", "comparison", "tuned"])
def folder(request):
    return request.getfixturevalue(request.param)


class Outline(HTMLParser):
    """Checks that tags are closed in order, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return [data for parent, data in self.texts if parent == tag]


def test_the_page_stands_alone_and_can_be_read_aloud(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    for tag in ("script", "link", "iframe", "object"):
        assert not outline.all(tag)
    for _, attributes in outline.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text
    assert outline.all("html") == [{"lang": "en"}] and len(outline.all("h1")) == 1
    assert all(image["alt"] for image in outline.all("img"))
    assert len(outline.all("table")) == len(outline.all("caption")) > 0
    assert all(head.get("scope") in ("col", "row") for head in outline.all("th"))
    charts = outline.all("svg")
    assert charts and all(chart["role"] == "img" for chart in charts)
    assert len(outline.text("title")) >= 1 + len(charts)


def test_the_page_of_a_run_shows_its_stages_channels_matrices_and_maps(run):
    outline = Outline((run / "report.html").read_text(encoding="utf-8"))
    report = json.loads((run / "report.json").read_text())
    cells = outline.text("td") + outline.text("th")
    for stage in report["stages"]:
        assert stage["stage"] in cells and f"{stage['accuracy %']:.2f}" in cells
    plan = PruningPlan.load(run / "plan.json")
    for name, group in plan.groups.items():
        assert name in cells and f"{len(group.kept)}/{group.channels}" in outline.text("text")
    assert json.dumps(report["repair options"]) in cells and "repair options" in cells
    kinds = [image["class"] for image in outline.all("img")]
    assert kinds.count("matrix") == len(plan.groups) == 3
    assert kinds.count("map") >= 1 + 2 * 3


def test_the_page_of_a_comparison_shows_its_tables_and_charts(comparison):
    outline = Outline((comparison / "report.html").read_text(encoding="utf-8"))
    result = json.loads((comparison / "comparison.json").read_text())
    cells = outline.text("td")
    for entry in result["summary"]:
        shown = f"{entry['report accuracy']:.2f} ± {entry['report accuracy spread']:.2f}"
        assert shown in cells
        mark = f"{entry['criterion']}: {shown}"
        assert mark in outline.text("title")
    assert cells.count("best") == 2


def test_the_page_of_a_comparison_shows_channels_matrices_and_maps(comparison):
    text = (comparison / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    result = json.loads((comparison / "comparison.json").read_text())
    groups, arms = result["plain"]["channels"], result["settings"]["criteria"]
    assert len(outline.all("rect")) == 2 * (len(arms) * len(groups) + 11)  # 11: the keys
    for budget in (0.7, 0.5):
        for arm in arms:
            of_arm = {"budget": budget, "criterion": arm}
            kept = [row["kept"] for row in result["rows"] if of_arm.items() <= row.items()]
            for group, channels in groups.items():
                share = sum(counts[group] for counts in kept) / (2 * channels)
                assert f"{arm}, {group}: {share:.0%}" in outline.text("title")
    assert f"Channels kept by layer, macs {budget}, in percent" in outline.text("caption")
    kinds = [image["class"] for image in outline.all("img")]
    assert kinds.count("matrix") == len(groups) == 3
    assert kinds.count("map") >= 1 + 2 * 3
    assert "costs of ccp, gathered from 96 training images" in text


def test_a_comparison_of_an_earlier_version_has_a_page_without_these(comparison, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(comparison, older)
    (older / "snapshot.safetensors").write_text("damaged")
    with pytest.raises(InputError, match="snapshot.safetensors"):
        page.write(older)
    (older / "snapshot.safetensors").unlink()
    result = json.loads((older / "comparison.json").read_text())
    del result["plain"]["channels"], result["settings"]["distil"]
    for entry in (*result["rows"], *result["summary"]):
        del entry["kept"]
    (older / "comparison.json").write_text(json.dumps(result))
    outline = Outline(page.write(older).read_text(encoding="utf-8"))
    assert not outline.all("img") and not outline.all("rect")
    headings = ["Accuracy against cost", "Ranks", "Tables", "Settings"]  # and no fine-tuning
    assert outline.text("h2") == headings


def test_a_criterion_without_pairwise_terms_has_a_page_with_those_of_ccp(inputs, tmp_path):
    output = tmp_path / "run"
    options = ("--macs", 0.5, "--criterion", "l1")
    assert cli.main(command("prune", inputs, output, *options)) == 0
    assert page.write(output, tmp_path / "page.html") == tmp_path / "page.html"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "scores each channel by itself. These are the pairwise costs of ccp, gathered" in text
    assert "no channel was chosen by them" in text and text.count('class="matrix"') == 3
    assert not (output / "report.html").exists()


def test_a_criterion_of_its_own_matrices_shows_those(run):
    assert snapshot.Snapshot.load(run / "snapshot.safetensors").note == ""
    assert "chosen by them" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_folder_without_a_run_or_with_a_damaged_one_is_refused(run, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    damages = {
        "report.json": ["{", "[]", '{"settings": {}, "stages": []}'],
        "snapshot.safetensors": ["text"],
        "plan.json": ["{}"],
    }
    for name, contents in damages.items():
        for content in contents:
            copied = tmp_path / "run"
            shutil.copytree(run, copied)
            (copied / name).write_text(content)
            with pytest.raises(InputError, match=re.escape(name)):
                page.write(copied)
            shutil.rmtree(copied)
    shutil.copytree(run, copied)
    (copied / "snapshot.safetensors").unlink()
    with pytest.raises(InputError, match="snapshot.safetensors"):
        page.write(copied)


# --- the curves of fine-tuning -------------------------------------------------------------------


def drawn(text):
    """The charts of a page by title."""
    found = [ElementTree.fromstring(chart) for chart in re.findall("<svg.*?</svg>", text)]
    return {chart.findtext("title"): chart for chart in found}


def lines_of(chart):
    """(class, places of its points) of each line in a chart, and what its marks say."""
    groups = [group for group in chart.iter("g") if group.find("polyline") is not None]
    places = [
        [
            tuple(map(float, point.split(",")))
            for point in group.find("polyline").get("points").split()
        ]
        for group in groups
    ]
    said = [[mark.findtext("title") for mark in group.findall("g")] for group in groups]
    return list(zip([group.get("class") for group in groups], places, said, strict=True))


def legend_of(chart):
    """The name and class of each line."""
    keys = [group for group in chart.iter("g") if group.find("text") is not None]
    return {group.findtext("text"): group.find("g").get("class") for group in keys}


def assert_at(places, values):
    """The points stand at epochs 1, 2, ... and at heights that are one line in ``values``."""
    across, heights = np.array(places).T
    np.testing.assert_allclose(np.diff(across, 2), 0, atol=0.21)
    assert (np.diff(across) > 1).all()
    fitted = np.poly1d(np.polyfit(values, heights, 1))
    assert fitted[1] < 0  # upwards
    np.testing.assert_allclose(fitted(values), heights, atol=0.11)


def log_of(folder, criterion, kind, budget, seed, column):
    path = folder / Job(criterion, kind, budget, "finetune", seed).log
    with open(path, newline="", encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("column", "title", "digits"),
    [("train_accuracy", "Training accuracy", 2), ("train_loss", "Training loss", 4)],
)
def test_the_curves_of_a_comparison_are_the_means_over_the_seeds(tuned, column, title, digits):
    charts = drawn((tuned / "report.html").read_text(encoding="utf-8"))
    assert sum(name.startswith(title) for name in charts) == 2
    for budget in (0.7, 0.5):
        chart = charts[f"{title}, macs {budget}, repair: finetune"]
        lines = lines_of(chart)
        assert len(lines) == 4 and len(legend_of(chart)) == 4
        every, values = [], []
        for style, places, said in lines:
            (name,) = {text.split(",")[0] for text in said}
            assert legend_of(chart)[name] == style
            row = (name, "macs", 1.0 if name == "unpruned" else budget)
            seeds = [log_of(tuned, *row, seed, column) for seed in (0, 1)]
            means = [statistics.fmean(pair) for pair in zip(*seeds, strict=True)]
            spreads = [statistics.stdev(pair) for pair in zip(*seeds, strict=True)]
            assert said == [
                f"{name}, epoch {k}: {mean:.{digits}f} ± {spread:.{digits}f}"
                for k, (mean, spread) in enumerate(zip(means, spreads, strict=True), 1)
            ]
            every, values = every + [y for _, y in places], values + means
            assert [x for x, _ in places] == [x for x, _ in lines[0][1]]
            assert (style == "series control") == (name == "unpruned")
        fitted = np.poly1d(np.polyfit(values, every, 1))  # one scale for all lines
        np.testing.assert_allclose(fitted(values), every, atol=0.11)
        assert fitted[1] < 0
        bands = [shape for shape in chart.iter("polygon") if shape.get("class") == "band"]
        assert len(bands) == 4 and all(len(band.get("points").split()) == 6 for band in bands)


def test_a_criterion_has_one_colour_in_all_charts(tuned):
    charts = drawn((tuned / "report.html").read_text(encoding="utf-8"))
    expected = {"l1": "series c0", "bn-scale": "series c1", "random": "series c2"}
    seen = [legend_of(chart) for title, chart in charts.items() if "repair" in title]
    assert len(seen) == 2 + 4
    assert all(expected.items() <= legend.items() for legend in seen)
    ranks = charts["Rank of each criterion"]
    names = [text.text for text in ranks.iter("text") if text.text in expected]
    styles = [group.get("class") for group in ranks.iter("g")]
    assert dict(zip(names, styles, strict=True)) == expected


def test_the_page_of_a_run_has_the_curves_of_its_log(run, tmp_path):
    charts = drawn((run / "report.html").read_text(encoding="utf-8"))
    with open(run / "finetune.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for title, column in (("accuracy", "train_accuracy"), ("loss", "train_loss")):
        [(style, places, said)] = lines_of(charts[f"Training {title}"])
        assert style == "series c0" and all(text.startswith("ccp, epoch") for text in said)
        values = [float(row[column]) for row in rows]
        assert_at(places, values)
        told = [float(text.split(": ")[1]) for text in said]
        np.testing.assert_allclose(told, values, atol=0.006)
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "finetune.csv").unlink()
    text = page.write(copied).read_text(encoding="utf-8")
    assert not any("Training" in title for title in drawn(text))
    assert "the logs of the epochs are missing" in text


@pytest.fixture
def written(tmp_path):
    """A function that writes logs with (accuracy, loss) and returns the charts of these rows."""

    def write(rows, epochs, spoil=lambda logs: None, **record):
        jobs = {key: Job(key[0], "macs", 0.5, "refit+finetune", key[1]) for key in rows}
        for key, job in jobs.items():
            log = tmp_path / job.log
            log.parent.mkdir(exist_ok=True)
            with epoch_log(log, []) as line:
                for epoch, (accuracy, loss) in enumerate(rows[key], 1):
                    line(
                        EpochRecord(epoch, 0.1, loss, accuracy, None, *record.values() or [None], 1)
                    )
        spoil({key: tmp_path / job.log for key, job in jobs.items()})
        result = {
            "settings": {"finetune": {"epochs": epochs}},
            "rows": [vars(job) for job in jobs.values()] + [vars(Job("a", "macs", 0.5, "none", 0))],
        }
        return curves.of_comparison(tmp_path, result, {"a": 0, "b": 1})

    return write


TWO = [(10.0, 2.0), (20.0, 1.0)]
FOUR = [(30.0, 4.0), (40.0, 3.0)]


def test_logs_that_cannot_be_read_are_named_and_left_out(written):
    def spoil(logs):
        logs["a", 1].unlink()
        logs["a", 2].unlink()
        logs["b", 1].write_bytes(b"\xff\xfe")
        lines = logs["b", 2].read_text().splitlines(keepends=True)
        logs["b", 2].write_text("".join(lines[:-1]))
        lines = logs["b", 3].read_text().replace("train_loss", "loss")
        logs["b", 3].write_text(lines)
        logs["c", 0].write_text("")
        logs["d", 0].write_text(logs["d", 0].read_text().replace("20.0", "nan"))

    keys = [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
        ("b", 1),
        ("b", 2),
        ("b", 3),
        ("c", 0),
        ("d", 0),
    ]
    accuracy, loss = written({key: FOUR if key[1] == 3 else TWO for key in keys}, 2, spoil)
    common = (
        "Left out: a (seeds 1, 2): no log; b (seed 1): a damaged log; "
        "b (seed 2), c (seed 0): a log without the epochs 1 to 2; "
    )
    assert accuracy.left_out == f"{common}d (seed 0): no numbers train_accuracy in the log."
    assert loss.left_out == f"{common}b (seed 3): no numbers train_loss in the log."
    assert {line.name: line.points for line in accuracy.series} == {
        "a": [(1, 10.0, None), (2, 20.0, None)],
        "b": [(1, 20.0, pytest.approx(200**0.5)), (2, 30.0, pytest.approx(200**0.5))],
    }
    assert {line.name: line.points[1][:2] for line in loss.series} == dict.fromkeys("abd", (2, 1.0))
    text = page._finetuning([accuracy, loss])
    assert accuracy.left_out in text and loss.left_out in text and len(drawn(text)) == 2


def test_a_quantity_that_no_log_has_is_said_to_be_missing(written):
    def spoil(logs):
        for log in logs.values():
            log.write_text(log.read_text().replace("train_loss", "loss"))

    text = page._finetuning(written({("a", 0): TWO}, 2, spoil))
    assert list(drawn(text)) == ["Training accuracy, macs 0.5, repair: refit+finetune"]
    assert "Training loss, macs 0.5, repair: refit+finetune: there is no curve. Left out: a" in text


def test_a_comparison_without_any_log_still_has_a_page(tuned, tmp_path):
    copied = tmp_path / "tuned"
    shutil.copytree(tuned, copied)
    shutil.rmtree(copied / "logs")
    text = page.write(copied).read_text(encoding="utf-8")
    assert (
        "Fine-tuning" in Outline(text).text("h2") and "the logs of the epochs are missing" in text
    )
    assert not any("Training" in title for title in drawn(text))


def test_curves_end_with_the_best_and_single_seeds_have_no_spread(written):
    accuracy, loss = written({("a", 0): TWO, ("b", 0): FOUR, ("unpruned", 0): TWO}, 2)
    assert [line.name for line in accuracy.series] == ["b", "a", "unpruned"]
    assert [line.style for line in accuracy.series] == [1, 0, None]
    assert all(spread is None for line in accuracy.series for *_, spread in line.points)
    assert "seeds" not in accuracy.note and accuracy.left_out == loss.left_out == ""
    text = page._finetuning([accuracy, loss])
    assert 'class="band"' not in text and text.count("<polyline") == 6


def test_validation_is_shown_where_it_was_measured(written):
    accuracy, _ = written({("a", 0): TWO}, 2, validation_accuracy=55.0)
    assert accuracy.unit == "validation accuracy, %"
    assert accuracy.series[0].points == [(1, 55.0, None), (2, 55.0, None)]


def test_a_single_epoch_has_marks_side_by_side_with_bars(written):
    rows = {("a", 0): TWO[:1], ("a", 1): FOUR[:1], ("b", 0): TWO[:1], ("b", 1): FOUR[:1]}
    chart = drawn(page._finetuning(written(rows, 1)))[
        "Training accuracy, macs 0.5, repair: refit+finetune"
    ]
    (_, [(left, height)], said), (_, [(right, other)], _) = lines_of(chart)
    assert right - left > 10 and height == other
    assert said == ["a, epoch 1: 20.00 ± 14.14"]
    bars = [line for line in chart.iter("line") if not line.get("class")]
    assert [bar.get("x1") for bar in bars] == [f"{left:.1f}", f"{right:.1f}"]
    assert all(float(bar.get("y2")) < height < float(bar.get("y1")) for bar in bars)
    ticks = [text.text for text in chart.iter("text") if text.get("class") == "middle"]
    assert ticks == ["1", "epoch", "training accuracy, %"]


def test_long_curves_have_all_their_points_and_few_marks():
    points = [(epoch, epoch**0.5, 0.1) for epoch in range(1, 101)]
    series = [svg.Series(name, points, k) for k, name in enumerate("ab")]
    (chart,) = drawn(svg.curves("title", "epoch", "y", series)).values()
    assert "min-width:368px" in chart.get("style")  # on a telephone of 400, behind its margins
    (_, places, first), (_, _, second) = lines_of(chart)
    assert_at(places, [y for _, y, _ in points])
    epochs = [{int(text.split()[2][:-1]) for text in said} for said in (first, second)]
    assert all(8 < len(marked) <= 13 for marked in epochs) and epochs[0] & epochs[1] == {100}


# --- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (4, 3, 3)])
def test_images_are_what_another_reader_reads(shape):
    image = pytest.importorskip("PIL.Image", reason="pillow is the independent reader")
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    read = np.asarray(image.open(io.BytesIO(page._png(pixels))))
    assert np.array_equal(read, pixels.squeeze(-1) if shape[-1] == 1 else pixels)


def test_s_hat_is_that_of_the_statistics():
    model = models.create("resnet8").eval()
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    graph = trace(model, x[:1]).inner
    with collect(model, graph, curvature="empirical", first_order=True) as stats:
        stats.backward(model(x), y)
    for name in stats:
        cost = stats[name].cost(first_order=True)
        expected = stats[name].s_hat().numpy()
        np.testing.assert_allclose(page.s_hat(cost.S, cost.u), expected, rtol=1e-6)


def test_the_most_similar_maps_are_found_and_blank_ones_left_out():
    torch.manual_seed(0)
    maps = torch.randn(12, 8, 8)
    maps[3], maps[7] = 0, 0  # equal but blank
    maps[9] = maps[2]
    maps[5] = maps[1] + 0.1 * maps[0]
    (i, j, value), second, *others = page._most_similar(maps)
    assert (i, j) == (2, 9) and value == pytest.approx(1)
    assert second[:2] == (1, 5) and second[2] < 1
    channels = [c for pair in others for c in pair[:2]] + [2, 9, 1, 5]
    assert len(set(channels)) == len(channels) and not {3, 7} & set(channels)
    assert page._most_similar(torch.zeros(4, 3, 3)) == []


def test_wide_matrices_are_averaged_in_blocks():
    wide = np.kron(np.arange(9.0).reshape(3, 3), np.ones((200, 200)))[:500, :500]
    assert page._shrunk(wide).shape == (250, 250)
    np.testing.assert_array_equal(
        page._shrunk(wide)[[0, 120, 249]][:, [0, 120, 249]], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    )
    np.testing.assert_array_equal(page._shrunk(wide[:256, :256]), wide[:256, :256])


def test_a_snapshot_comes_back_and_holds_the_maps_of_the_gates(tmp_path):
    torch.manual_seed(0)
    model = models.create("resnet8").eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    images = ImageSet(pixels, labels, (0.5,) * 3, (0.2,) * 3, 10, "noise")
    x = images.normalise(images.images[:1])
    graph = trace(model, x).inner
    costs = {g.name: Cost(torch.eye(g.channels), torch.ones(g.channels)) for g in graph.groups}
    taken = snapshot.take(model, graph, images, costs)
    taken.save(tmp_path / "s.safetensors")
    read = snapshot.Snapshot.load(tmp_path / "s.safetensors")
    for group in graph.groups:  # ResNet-8 has three
        seen = []
        reader = model.get_submodule(group.consumers[0].module)
        hook = reader.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        with torch.no_grad():
            model(x)
        hook.remove()
        cost = costs[group.name]
        assert torch.equal(read.maps[group.name], seen[0][0])
        assert torch.equal(read.S[group.name], cost.S) and torch.equal(read.u[group.name], cost.u)
    assert torch.equal(read.image, images.images[0])


@pytest.fixture
def scene():
    """A model, its graph, and a few images more than a snapshot takes."""
    torch.manual_seed(0)
    model = models.create("resnet8").eval()
    pixels = torch.randint(0, 256, (snapshot.IMAGES + 8, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(len(pixels)) % 10
    images = ImageSet(pixels, labels, (0.5,) * 3, (0.2,) * 3, 10, "noise")
    return model, trace(model, images.normalise(pixels[:1])).inner, images


def test_costs_that_are_not_pairwise_are_shown_beside_those_of_ccp(scene):
    model, graph, images = scene
    scores = {g.name: Cost(u=torch.ones(g.channels)) for g in graph.groups}
    taken = snapshot.take(model, graph, images, scores, progress=False)
    few = images.subset(range(snapshot.IMAGES))
    with collect(model, graph, first_order=False) as stats:
        for x, y in few.batches(snapshot.BATCH_SIZE):
            stats.backward(model(x), y)
    assert list(taken.S) == list(stats) and not taken.u
    for name in stats:
        torch.testing.assert_close(taken.S[name], stats[name].S)
    assert f"from {snapshot.IMAGES} training images" in taken.note


def without_derivative():
    raise RuntimeError("no derivative of this operator")


def refused_by_an_operator():
    ops.channel_dot(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (without_derivative, "no derivative of this operator."),
        (refused_by_an_operator, "from this model: channel_dot: x must be float32, "),
    ],
)
def test_a_model_without_derivatives_has_a_snapshot_without_matrices(
    fail, message, scene, monkeypatch, tmp_path
):
    monkeypatch.setattr(gathering, "collect", lambda *_, **__: fail())
    taken = snapshot.take(*scene, progress=False)
    taken.save(tmp_path / "s.safetensors")
    read = snapshot.Snapshot.load(tmp_path / "s.safetensors")
    assert not read.S and len(read.maps) == 3
    assert message in read.note


def test_the_channels_of_a_matrix_without_a_plan_stand_by_what_each_costs_alone(tmp_path):
    S = torch.diag(torch.tensor([1.0, 8.0, 4.0]))
    u = torch.tensor([0.0, 3.5, 0.0])  # costs: 0.5, 0.5, 2
    blank = torch.zeros(3, 4, 4)
    taken = snapshot.Snapshot(torch.zeros(3, 4, 4).byte(), {"g": S}, {"g": u}, {"g": blank})
    taken.save(tmp_path / "s.safetensors")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_heat_map", lambda *given: shown.append(given) or "")
        page._of_plain_model(tmp_path / "s.safetensors")
    [(group, _, arranged)] = shown
    assert group == "g" and arranged.order == [2, 0, 1] and arranged.parted is None


def test_the_fuller_a_cell_the_darker_it_is():
    rows = [("first", [0.0, 0.25]), ("<second>", [1.0, 0.5])]
    outline = Outline(svg.shares("title", "kept", rows, ["one", "two"]))
    cells = outline.all("rect")[11:]
    assert [float(cell["fill-opacity"]) for cell in cells] == [0, 0.25, 1, 0.5]
    assert cells[0]["y"] == cells[1]["y"] < cells[2]["y"]
    assert cells[0]["x"] == cells[2]["x"] < cells[1]["x"]
    assert "<second>, one: 100%" in outline.text("title")
    many = [f"group{k}" for k in range(100)]
    text = svg.shares("title", "kept", [("first", [0.5] * 100)], many)
    shown = sum(name in Outline(text).text("text") for name in many)
    assert 20 < shown <= 460 / 13  # those that do not touch


def test_charts_hold_all_their_points_inside():
    series = [
        svg.Series("one", [(10.0, 1.0, None)]),
        svg.Series("<two>", [(10.0, 1.0, 0.0), (20.0, 3.0, 0.5)], style=9),
    ]
    text = svg.lines("title", "x", "y", series, ("level", 4.0))
    assert "&lt;two&gt;" in text and "<two>" not in text
    outline = Outline(text)
    for mark in outline.all("circle"):
        assert 0 < float(mark["cx"]) < 640 and 0 < float(mark["cy"]) < 400
    assert len(outline.all("circle")) + len(outline.all("polygon")) == 3 + 2  # and the legend
    assert svg.lines("title", "x", "y", series[:1], None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.31, 0.69, [0.4, 0.5, 0.6]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (5, 110, [20, 40, 60, 80, 100]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert svg._ticks(low, high) == pytest.approx(expected)


# --- in a browser --------------------------------------------------------------------------------

PROBE = """
<script>
addEventListener("load", () => {
  const rest = document.documentElement, style = getComputedStyle(document.body);
  const seen = (e) => { const b = e.getBoundingClientRect(); return b.width > 20 && b.height > 5; };
  const inside = (t) => {
    const a = t.getBoundingClientRect(), b = t.closest("svg").getBoundingClientRect();
    return a.left >= b.left - 1 && a.right <= b.right + 1 && a.bottom <= b.bottom + 1;
  };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const result = {
    requests: performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:"))
      .length,
    overflow: rest.scrollWidth - rest.clientWidth,
    pictures: all("img").every((i) => i.complete && i.naturalWidth > 0),
    charts: all("svg").every(seen),
    labels: all("svg text").filter((t) => !inside(t)).map((t) => t.textContent),
    colours: [style.color, style.backgroundColor],
    best: all("tr.best td").every((c) => getComputedStyle(c).fontWeight === "700"),
  };
  document.body.replaceChildren(JSON.stringify(result));
});
</script>
"""


def browse(folder, tmp_path, width, dark):
    """What a browser makes of the page, by a script that is added to a copy of it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: install chromium to look at the page in one")
    copied = tmp_path / "page.html"
    copied.write_text((folder / "report.html").read_text(encoding="utf-8") + PROBE, "utf-8")
    finished = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",  # refused to the superuser otherwise
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            copied.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    body = finished.stdout.partition("<body>")[2].partition("</body>")[0]
    return json.loads(body)


def brightness(colour):
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / (3 * 255)


@pytest.mark.parametrize(("width", "dark"), [(500, True), (1300, False)])
def test_a_browser_shows_the_whole_page(folder, width, dark, tmp_path):
    seen = browse(folder, tmp_path, width, dark)
    assert seen["requests"] == 0 and seen["overflow"] <= 0
    assert seen["pictures"] and seen["charts"] and seen["best"]
    assert seen["labels"] == []
    ink, paper = map(brightness, seen["colours"])
    assert (ink > 0.8 and paper < 0.2) if dark else (ink < 0.2 and paper > 0.8)
