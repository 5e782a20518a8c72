"""Photos in folders by class, which stay on disk until a batch needs them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ccp_ext import cli, datasets
from ccp_ext.datasets.folder import Photos
from ccp_ext.errors import InputError

image = pytest.importorskip("PIL.Image", reason="photos are decoded by Pillow")


def write_photo(file: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.RandomState(seed).randint(0, 256, (*reversed(size), 3), np.uint8)
    image.fromarray(values).save(file)


@pytest.fixture
def tree(tmp_path):
    """Three photos of each of two classes for training, two for the test."""
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("bee", "ant")):
            for k in range(count):
                write_photo(
                    tmp_path / part / name / f"{k}.png", 10 * label + k + 100 * (count == 2)
                )
    return tmp_path


def test_photos_have_the_classes_of_their_folders_in_the_order_of_names(tree):
    train, test = (datasets.load(tree, split) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert [f.parent.name for f in train.images.files] == ["ant"] * 3 + ["bee"] * 3
    assert train.num_classes == 2 and train.images.shape == (6, 3, 224, 224)
    assert train.mean == (0.485, 0.456, 0.406)
    everything = datasets.load(tree, "all")
    assert everything.images.files == train.images.files + test.images.files


def test_without_parts_every_class_is_split(tmp_path):
    for name in ("a", "b"):
        for k in range(10):
            write_photo(tmp_path / name / f"{k}.jpg", k)
    (tmp_path / "notes").mkdir()  # no photos, no class
    train, test = (datasets.load(tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == [0] * 8 + [1] * 8 and test.labels.tolist() == [0] * 2 + [1] * 2
    assert not set(train.images.files) & set(test.images.files)


@pytest.mark.parametrize("size", [(300, 256), (224, 500), (40, 30), (256, 257), (1000, 333)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_window_is_that_of_torchvisions_evaluation(size, mode, tmp_path):
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is missing")
    write_photo(tmp_path / "photo.png", 0, size)
    image.open(tmp_path / "photo.png").convert(mode).save(tmp_path / "photo.png")
    customary = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    expected = customary(image.open(tmp_path / "photo.png").convert("RGB"))
    assert torch.equal(Photos([tmp_path / "photo.png"])[0], expected)


def test_a_photo_is_scaled_and_its_centre_cut_out(tmp_path):
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[16:240, 144:368] = 200  # the central window
    image.fromarray(pixels).save(tmp_path / "centre.png")
    photos = Photos([tmp_path / "centre.png"])
    assert photos[:1].shape == (1, 3, 224, 224) and bool((photos[0] == 200).all())
    image.fromarray(pixels).resize((1024, 512)).save(tmp_path / "large.png")
    assert bool((Photos([tmp_path / "large.png"])[0][:, 2:-2, 2:-2] == 200).all())


def test_indices_batches_and_subsets_agree_with_a_tensor(tree):
    train = datasets.load(tree, "train")
    pixels = train.images[:]
    index = torch.tensor([4, 0, 4])
    assert torch.equal(train.images[index], pixels[index])
    assert torch.equal(train.images[1:3], pixels[1:3]) and torch.equal(train.images[5], pixels[5])
    assert train.images[6:].shape == (0, 3, 224, 224)
    assert torch.equal(train.images[-1], pixels[-1])
    bees = train.labels == 1
    assert torch.equal(train.images[bees], pixels[bees])
    subset = train.subset(index)
    assert isinstance(subset.images, Photos)  # not decoded
    ((x, y),) = subset.batches(8)
    assert torch.equal(x, train.normalise(pixels[index])) and y.tolist() == [1, 0, 1]
    moved = train.images.to("meta")
    assert moved.device.type == moved[:2].device.type == "meta"


def crops_of(photo: np.ndarray, tmp_path, draws: list[list[float]]) -> torch.Tensor:
    image.fromarray(photo).save(tmp_path / "photo.png")
    photos = Photos([tmp_path / "photo.png"])
    return photos.resized_crops(torch.zeros(len(draws), dtype=torch.int64), torch.tensor(draws))


def test_a_resized_crop_is_the_part_that_its_draw_names(tmp_path):
    """400 x 300 pixels in a ramp from left to right, and in another channel from top to bottom."""
    ramp = np.zeros((300, 400, 3), np.uint8)
    ramp[:, :, 0] = np.arange(400) // 2
    ramp[:, :, 1] = np.arange(300)[:, None] // 2
    square, most = 0.5, 1 - 2**-24  # ratio 1; the largest float32 draw
    # A quarter of the area: 173 x 173 pixels, in the corners and mirrored.
    share = (0.25 - 0.08) / 0.92
    draws = [
        [share, square, 0, 0, 0],
        [share, square, most, most, 0],
        [share, square, 0, 0, 0.5],
        [most, square, 0.5, 0.5, 0],  # 346 x 346, cut to the height of 300
        [0, 0, 0, 0, 0],  # 8%, 3:4, so 85 x 113
        [0, most, 0, 0, 0],
    ]
    first, last, mirrored, whole, high, wide = crops_of(ramp, tmp_path, draws)
    assert first.shape == (3, 224, 224) and torch.equal(mirrored, first.flip(2))

    def spans(crop: torch.Tensor) -> list[int]:
        return [int(v) for v in (*crop[0, 0, [0, -1]], *crop[1, [0, -1], 0])]

    assert spans(first) == [0, 172 // 2, 0, 172 // 2]
    assert spans(last) == [(400 - 173) // 2, 399 // 2, (300 - 173) // 2, 299 // 2]
    assert spans(whole) == [27 // 2, (27 + 345) // 2, 0, 299 // 2]
    assert spans(high) == [0, 84 // 2, 0, 112 // 2] and spans(wide) == [0, 112 // 2, 0, 84 // 2]


def test_resized_crops_train_and_are_functions_of_the_seed(tree):
    train = datasets.load(tree, "train")
    options = dict(shuffle=True, augment="resized_crop_flip")
    first, again, other = (
        torch.cat([x for x, _ in train.batches(4, seed=seed, **options)]) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    ((rest, _),) = train.batches(4, seed=3, start=1, **options)
    assert torch.equal(rest, first[4:])
    with pytest.raises(InputError, match="the test split is for evaluation only"):
        datasets.load(tree, "test").batches(4, augment="resized_crop_flip")


def test_resized_crops_of_images_in_memory_are_refused_before_anything_runs(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    command = ["prune", "--model", "resnet8", "--weights", "none.pt", "--data", "digits"]
    command += ["--macs", "0.5", "--epochs", "1", "--augment", "resized_crop_flip"]
    assert cli.main([*command, "--output", str(tmp_path / "run")]) != 0
    assert "is for photos in folders" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_next_batch_is_decoded_while_one_is_in_use(tree, monkeypatch):
    decoded, enough = [], threading.Event()

    def decode(file: Path) -> np.ndarray:
        decoded.append(file)
        if len(decoded) == 4:
            enough.set()
        return np.zeros((224, 224, 3), np.uint8)

    monkeypatch.setattr("ccp_ext.datasets.folder.read_window", decode)
    batches = datasets.load(tree, "train").batches(2)
    next(batches)
    assert enough.wait(10) and len(decoded) == 4  # of the second, but not of the third
    batches.close()
    assert len(decoded) == 4


def test_a_damaged_photo_is_reported_when_its_batch_is_due(tree):
    train = datasets.load(tree, "train")
    train.images.files[4].write_bytes(b"text")
    batches = train.batches(2)
    next(batches), next(batches)
    with pytest.raises(InputError, match="is not a readable picture"):
        next(batches)


def test_a_changed_file_changes_the_identity(tree):
    def fingerprint() -> list[int]:
        return datasets.load(tree, "train").identity()[0].tolist()

    before = fingerprint()
    assert fingerprint() == before
    write_photo(tree / "train" / "ant" / "1.png", 5, (41, 30))
    assert fingerprint() != before


def test_bad_folders_are_refused(tree, tmp_path_factory):
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            datasets.load(folder, "test")

    (tree / "train" / "cat").mkdir()
    refused(tree, "cat holds no photos")
    write_photo(tree / "train" / "cat" / "0.png", 0)
    refused(tree, "val and train must hold the same classes; 'cat' is only in one")
    alone = tmp_path_factory.mktemp("alone")
    write_photo(alone / "train" / "ant" / "0.png", 0)
    refused(alone, "holds train, but neither val nor test")
    (alone / "train").rename(alone / "photos")
    (alone / "photos" / "ant" / "0.png").rename(alone / "photos" / "0.png")
    refused(alone, "photos of one class, 'photos'; it takes two")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        for k in range(5):
            write_photo(tmp_path / name / f"{k}.png", k)
    train = datasets.load(tmp_path, "train")
    assert train.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n half"])
def test_a_damaged_photo_is_named(content, tree):
    file = tree / "train" / "bee" / "2.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match="2.png is not a readable picture"):
        list(datasets.load(tree, "train").batches(6))


def test_a_truncated_photo_is_named(tree):
    file = tree / "train" / "bee" / "2.png"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match="2.png is not a readable picture"):
        list(datasets.load(tree, "train").batches(6))


def test_a_network_is_pruned_on_photos(tree, tmp_path, capsys):
    from ccp_ext import models

    torch.manual_seed(0)
    torch.save(models.create("resnet8", num_classes=2).state_dict(), tmp_path / "weights.pt")
    output = tmp_path / "run"
    command = ["prune", "--quiet", "--model", "resnet8", "--weights", tmp_path / "weights.pt"]
    command += ["--data", tree, "--macs", 0.6, "--output", output, "--repair", "refit-linear"]
    assert cli.main([str(word) for word in command]) == 0
    assert (output / "slim.safetensors").exists()
    assert cli.main(["report", str(output)]) == 0
