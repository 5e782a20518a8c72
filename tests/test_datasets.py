"""Readers, image sets and the batch loader."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ccp_ext import datasets
from ccp_ext.datasets import ImageSet, crop_flip, load
from ccp_ext.errors import InputError


def numbered_set(count: int = 20, split: str = "train", size: int = 6) -> ImageSet:
    """Image n is filled with the value n and has the label n mod 5."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, size, size)
    labels = torch.arange(count) % 5
    return ImageSet(images, labels, (0.0,) * 3, (1 / 255,) * 3, 5, "numbered", split)


def numbers(image_set: ImageSet, *args, **options) -> list[int]:
    """Which images the batches hold, in order."""
    batches = image_set.batches(*args, **options)
    return [round(value) for x, _ in batches for value in x[:, 0, 3, 3].tolist()]


# The image set


def test_a_batch_holds_normalised_floats_and_the_labels():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    image_set = ImageSet(images, torch.tensor([2, 0, 1]), (0.5, 0.0), (0.25, 1.0), 3, "grey")
    [(x, y)] = image_set.batches(8)
    assert x.dtype == torch.float32 and x.shape == (3, 2, 4, 4)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([-2.0, -1.2, 2.0]))
    torch.testing.assert_close(x[:, 1, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    assert y.tolist() == [2, 0, 1]


def test_batches_cover_the_set_in_order_with_a_smaller_last_one():
    image_set = numbered_set(20)
    assert [len(y) for _, y in image_set.batches(8)] == [8, 8, 4]
    assert image_set.num_batches(8) == 3
    assert numbers(image_set, 8) == list(range(20))


def test_shuffling_is_a_permutation_decided_by_the_seed():
    image_set = numbered_set(20)
    first = numbers(image_set, 8, shuffle=True, seed=1)
    assert first == numbers(image_set, 8, shuffle=True, seed=1)
    assert first == numbers(image_set, 3, shuffle=True, seed=1)
    assert first != numbers(image_set, 8, shuffle=True, seed=2)
    assert sorted(first) == list(range(20)) and first != list(range(20))
    for x, y in image_set.batches(7, shuffle=True, seed=4):
        assert [round(v) % 5 for v in x[:, 0, 0, 0].tolist()] == y.tolist()


def test_start_gives_the_rest_of_the_same_pass():
    options = dict(shuffle=True, seed=3, augment="crop_flip")
    whole = list(numbered_set(20).batches(6, **options))
    rest = list(numbered_set(20).batches(6, start=2, **options))
    assert len(rest) == 2
    for (x, y), (x_rest, y_rest) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x_rest) and torch.equal(y, y_rest)


def test_the_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(numbered_set().batches(4, shuffle=True, augment="crop_flip"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"shuffle": True}, {"augment": "crop_flip"}])
def test_the_test_split_is_never_shuffled_or_augmented(options):
    with pytest.raises(InputError, match="test split is for evaluation only"):
        numbered_set(split="test").batches(4, **options)
    assert numbers(numbered_set(split="test"), 4) == list(range(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"batch_size": 4, "augment": "mixup"},
            "augment must be None or crop_flip or resized_crop_flip, got 'mixup'",
        ),
        ({"batch_size": 4, "start": 6}, r"start must be within 0..5 batches, got 6"),
    ],
)
def test_bad_batch_options_are_refused_at_the_call(options, message):
    with pytest.raises(InputError, match=message):
        numbered_set(20).batches(**options)


@pytest.mark.parametrize("indices", [[4, 0, 4], torch.tensor([4, 0, 4]), np.array([4, 0, 4])])
def test_a_subset_holds_the_chosen_images(indices):
    subset = numbered_set().subset(indices)
    assert numbers(subset, 8) == [4, 0, 4]
    assert subset.labels.tolist() == [4, 0, 4]
    assert subset.mean == (0.0,) * 3 and subset.split == "train"


def test_a_subset_by_range_is_a_slice():
    assert numbers(numbered_set().subset(range(5, 9)), 8) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("indices", "message"),
    [([3, 20], r"index 20 is outside 0\.\.19"), ([-1], "index -1 is outside"), ([0.5], "integers")],
)
def test_a_subset_refuses_bad_indices(indices, message):
    with pytest.raises(InputError, match=message):
        numbered_set().subset(indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 2, 2)}, "images must be uint8 .* got torch.float32"),
        ({"images": torch.zeros(4, 3, 2, dtype=torch.uint8)}, r"\[N, C, H, W\].*\(4, 3, 2\)"),
        ({"images": torch.zeros(0, 3, 2, 2, dtype=torch.uint8)}, "no empty dimension"),
        ({"labels": torch.zeros(4)}, r"labels must be int64 of shape \(4,\).* got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"shape \(4,\).* got .*\(3,\)"),
        ({"labels": torch.tensor([0, 1, 5, 0])}, r"label 5 of image 2 is outside 0\.\.4"),
        ({"labels": torch.tensor([0, -1, 0, 0])}, "label -1 of image 1"),
        ({"mean": (0.5,)}, "mean must be 3 finite numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0"),
        ({"std": (1.0, float("nan"), 1.0)}, "std must be 3 finite numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {
        "images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "num_classes": 5,
        "name": "parts",
    }
    with pytest.raises(InputError, match=message):
        ImageSet(**{**parts, **change})


# Augmentation


def test_the_central_window_without_a_flip_is_the_image():
    images = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8)
    assert torch.equal(crop_flip(images, torch.tensor([[4, 4, 0]] * 3)), images)


def test_crop_flip_agrees_with_slicing_image_by_image():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (40, 3, 8, 5), dtype=torch.uint8, generator=generator)
    draws = datasets.image_set.draw_crop_flips(40, generator)
    assert draws[:, :2].min() == 0 and draws[:, :2].max() == 8 and draws[:, 2].unique().numel() == 2
    for image, (top, left, flip), got in zip(
        images, draws.tolist(), crop_flip(images, draws), strict=True
    ):
        padded = torch.zeros(3, 16, 13, dtype=torch.uint8)
        padded[:, 4:12, 4:9] = image
        expected = padded[:, top : top + 8, left : left + 5]
        assert torch.equal(got, expected.flip(2) if flip else expected)


# Readers


def test_digits_have_every_digit_in_both_splits_and_share_no_image():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train, test = load("digits"), load("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape[1:] == (1, 8, 8) and train.images.max() == 255
    assert train.split == "train" and test.split == "test"
    assert train.mean == test.mean and train.std == test.std
    share = test.labels.bincount(minlength=10) / (train.labels.bincount() + test.labels.bincount())
    assert share.min() > 0.19 and share.max() < 0.21
    assert torch.equal(load("digits", "train").images, train.images)
    [(x, _)] = train.batches(len(train))
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_all_is_the_training_part_and_then_the_test_part():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train, both = load("digits", "train"), load("digits", "all")
    assert len(both) == 1797 and both.split == "all"
    assert torch.equal(both.images[: len(train)], train.images)
    assert both.images.double().sum() == load("digits", "test").images.double().sum() + (
        train.images.double().sum()
    )


@pytest.mark.parametrize(("package", "source"), [("sklearn", "digits"), ("PIL", "sprites")])
def test_a_missing_package_is_one_sentence_with_its_name(monkeypatch, tmp_path, package, source):
    if source == "sprites":
        source = tmp_path
        (tmp_path / "labels.txt").write_text("0" * 300)
        (tmp_path / "cifar10_test.webp").write_bytes(b"")
    real_import = builtins.__import__

    def importer(name, *args, **options):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", importer)
    with pytest.raises(InputError, match="pip install (scikit-learn|pillow)"):
        load(source, "test")


def write_sprites(folder: Path) -> tuple[np.ndarray, str]:
    """A CIFAR-10 folder of six sprites with 50 tiles each: all 300 images, and the labels."""
    image = pytest.importorskip("PIL.Image", reason="sprites are decoded by Pillow")
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (300, 3, 32, 32)).astype(np.uint8)
    labels = "".join(str(k) for k in random.randint(0, 10, 300))
    for k, name in enumerate([*(f"train{k}" for k in range(1, 6)), "test"]):
        tiles = images[50 * k : 50 * k + 50].transpose(2, 0, 3, 1).reshape(32, 1600, 3)
        image.fromarray(tiles).save(folder / f"cifar10_{name}.webp", lossless=True)
    (folder / "labels.txt").write_text(labels + "\n")
    return images, labels


def test_sprites_are_read_in_order(tmp_path):
    images, labels = write_sprites(tmp_path)
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert np.array_equal(train.images.numpy(), images[:250])
    assert np.array_equal(test.images.numpy(), images[250:])
    assert "".join(map(str, train.labels.tolist() + test.labels.tolist())) == labels
    assert train.mean == (0.485, 0.456, 0.406) and train.std == (0.229, 0.224, 0.225)
    assert train.num_classes == 10


def test_the_normalisation_can_be_given(tmp_path):
    write_sprites(tmp_path)
    image_set = load(tmp_path, "test", mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert image_set.mean == (0.1, 0.2, 0.3) and image_set.std == (1.0, 2.0, 3.0)


def test_cifar10_is_found_by_root_or_by_the_environment(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    write_sprites(tmp_path / "cifar10")
    assert len(load("cifar10", "test", root=tmp_path)) == 50
    monkeypatch.setenv("CCP_DATA", str(tmp_path))
    assert len(load("cifar10", "test")) == 50
    monkeypatch.delenv("CCP_DATA")
    with pytest.raises(InputError, match="CCP_DATA"):
        load("cifar10", "test")


def test_damaged_sprite_folders_are_refused_by_name(tmp_path):
    write_sprites(tmp_path)
    sprite, labels = tmp_path / "cifar10_test.webp", tmp_path / "labels.txt"
    good_sprite, good_labels = sprite.read_bytes(), labels.read_text()

    sprite.write_bytes(good_sprite[: len(good_sprite) // 2])
    with pytest.raises(InputError, match=r"cifar10_test\.webp is not a whole image"):
        load(tmp_path, "test")
    sprite.write_bytes(good_sprite)

    labels.write_text(good_labels.strip()[:-6])
    with pytest.raises(InputError, match="holds 50 tiles, but labels.txt has 49 labels"):
        load(tmp_path, "test")
    labels.write_text(good_labels.strip()[:-1])
    with pytest.raises(InputError, match="holds 299 labels"):
        load(tmp_path, "test")
    labels.write_text("x" + good_labels[1:])
    with pytest.raises(InputError, match="label 'x' is not a digit"):
        load(tmp_path, "test")
    labels.unlink()
    with pytest.raises(InputError, match=r"labels\.txt cannot be read"):
        load(tmp_path, "test")
    labels.write_text(good_labels)

    (tmp_path / "cifar10_train3.webp").unlink()
    with pytest.raises(InputError, match=r"cifar10_train3\.webp cannot be read"):
        load(tmp_path, "train")


def test_a_sprite_of_another_size_is_refused(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="sprites are decoded by Pillow")
    write_sprites(tmp_path)
    image.new("RGB", (1600, 40)).save(tmp_path / "cifar10_test.webp")
    with pytest.raises(InputError, match="is 1600 x 40 pixels"):
        load(tmp_path, "test")


def write_pickles(folder: Path) -> np.ndarray:
    data = np.random.RandomState(1).randint(0, 256, (60, 3072)).astype(np.uint8)
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {b"data": data[10 * k : 10 * k + 10], b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
    return data.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("below", [".", "cifar-10-batches-py"])
def test_official_pickles_are_read(tmp_path, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    images = write_pickles(folder)
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert np.array_equal(train.images.numpy(), images[:50])
    assert np.array_equal(test.images.numpy(), images[50:])
    assert train.labels.tolist() == list(range(10)) * 5


def test_a_pickle_cannot_run_code(tmp_path):
    write_pickles(tmp_path)
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(InputError, match="mkdir is not admitted"):
        load(tmp_path, "test")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, r"shape \(1, 3072\)"),
        ({b"data": np.zeros((1, 3072)), b"labels": [0]}, "got float64"),
        ({b"data": [[0] * 3072], b"labels": [0]}, "got list"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["a"]}, "list of integers"),
        ({b"labels": [0]}, "not a CIFAR-10 batch"),
        ([1, 2], "not a CIFAR-10 batch"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "label 10 of image 0"),
    ],
)
def test_a_pickle_with_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        load(tmp_path, "test")


def test_a_truncated_pickle_is_refused(tmp_path):
    write_pickles(tmp_path)
    path = tmp_path / "test_batch"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="test_batch is not a CIFAR-10 batch"):
        load(tmp_path, "test")


def test_npz_with_its_own_split_is_taken_as_it_is(tmp_path):
    random = np.random.RandomState(2)
    arrays = {
        "train_images": random.randint(0, 200, (12, 3, 4, 4)).astype(np.uint8),
        "train_labels": np.arange(12, dtype=np.uint8) % 3,
        "test_images": random.randint(0, 256, (5, 3, 4, 4)).astype(np.uint8),
        "test_labels": np.array([0, 1, 2, 3, 0], dtype=np.int32),
    }
    np.savez(tmp_path / "own.npz", **arrays)
    train, test = load(tmp_path / "own.npz"), load(tmp_path / "own.npz", "test")
    assert np.array_equal(train.images.numpy(), arrays["train_images"])
    assert test.labels.tolist() == [0, 1, 2, 3, 0] and test.num_classes == train.num_classes == 4
    scaled = arrays["train_images"] / 255
    np.testing.assert_allclose(test.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(test.std, scaled.std((0, 2, 3)), rtol=1e-9)


def test_npz_without_a_split_is_split_by_class(tmp_path):
    images = np.arange(50, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    np.savez_compressed(tmp_path / "own.npz", images=images, labels=np.arange(50) % 5)
    train, test = load(tmp_path / "own.npz"), load(tmp_path / "own.npz", "test")
    assert train.images.shape == (40, 1, 4, 4) and test.images.shape == (10, 1, 4, 4)
    assert test.labels.bincount().tolist() == [2] * 5
    values = torch.cat([train.images, test.images])[:, 0, 0, 0].tolist()
    assert sorted(values) == list(range(50))


GOOD = {"images": np.zeros((5, 3, 4, 4), np.uint8), "labels": np.arange(5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": GOOD["images"].astype(float)}, "images must be uint8 .* got float64"),
        ({"images": np.zeros((5, 4), np.uint8)}, r"got uint8 of shape \(5, 4\)"),
        ({"images": np.zeros((5, 4, 4, 3), np.uint8)}, "channels last"),
        ({"labels": np.arange(4)}, r"labels must be integers of shape \(5,\)"),
        ({"labels": np.arange(5.0)}, "got float64"),
        ({"labels": np.arange(5) - 1}, "labels hold -1; labels begin at 0"),
        ({"labels": np.array([object()] * 5)}, "not a readable .npz file"),
    ],
)
def test_bad_npz_arrays_are_refused(tmp_path, change, message):
    path = tmp_path / "own.npz"
    np.savez(path, **{**GOOD, **change})
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_an_npz_without_the_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "own.npz", images=GOOD["images"], y=GOOD["labels"])
    with pytest.raises(InputError, match="no array 'labels'; it holds images, y"):
        load(tmp_path / "own.npz")


def test_a_broken_npz_is_refused(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable .npz file"):
        load(path)
    damaged = bytearray(whole)
    damaged[150] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="not a readable .npz file"):
        load(path)


def test_labels_beyond_a_given_number_of_classes_are_refused(tmp_path):
    np.savez(tmp_path / "own.npz", **GOOD)
    with pytest.raises(InputError, match=r"label 3 of image 3 is outside 0\.\.2 \(num_classes=3\)"):
        load(tmp_path / "own.npz", num_classes=3)
    assert load(tmp_path / "own.npz", num_classes=9).num_classes == 9


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("digits", "validation", "split must be one of train, test, all, got 'validation'"),
        ("imagenet", "train", "data set 'imagenet' is unknown"),
        ("nowhere.npz", "train", "data set 'nowhere.npz' is unknown"),
    ],
)
def test_unknown_names_are_refused(source, split, message):
    with pytest.raises(InputError, match=message):
        load(source, split)


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"neither cifar10_test\.webp nor test_batch"):
        load(tmp_path, "test")


@pytest.mark.skipif("CCP_DATA" not in os.environ, reason="CCP_DATA does not name a data folder")
def test_the_real_cifar10_test_split():
    test = load("cifar10", "test")
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
