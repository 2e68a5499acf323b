"""Generated images: the same everywhere, different in every class."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetu.data import GratingImagesDataModule


def test_images_are_the_same_in_every_process_and_differ_otherwise() -> None:
    one, two = (GratingImagesDataModule(train_images=64, val_images=64) for _ in range(2))
    other = GratingImagesDataModule(train_images=64, val_images=64, seed=1)
    for index in (0, 7, 63):
        assert torch.equal(one.training[index]["pixel_values"], two.training[index]["pixel_values"])
        assert not torch.equal(one.training[index]["pixel_values"], other.training[index]["pixel_values"])
        assert not torch.equal(one.training[index]["pixel_values"], one.validation[index]["pixel_values"])


@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_classes_can_be_told_apart(num_classes: int) -> None:
    """The strongest frequency of each image, without noise, names its class alone."""
    data = GratingImagesDataModule(num_classes=num_classes, train_images=256, val_images=32, noise=0.0)
    found: dict[tuple[int, ...], set[int]] = {}
    for index in range(256):
        image = data.training[index]
        spectrum = torch.fft.rfft2(image["pixel_values"][0]).abs()
        spectrum[0, 0] = 0
        peak = tuple(int(i) for i in torch.unravel_index(spectrum.argmax(), spectrum.shape))
        found.setdefault(peak, set()).add(int(image["labels"]))
    assert all(len(classes) == 1 for classes in found.values()), found
    assert set().union(*found.values()) == set(range(num_classes))


def test_batches_have_what_a_vision_model_takes() -> None:
    data = GratingImagesDataModule(batch_size=6, train_images=20, val_images=13, image_size=8, channels=1)
    batches = list(data.train_dataloader())
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(6, 1, 8, 8)] * 3
    assert batches[0]["labels"].dtype == torch.int64
    assert len(list(data.val_dataloader())) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 1}, "num_classes=1: expected at least 2"),
        ({"image_size": 0}, "image_size=0"),
        ({"train_images": 3, "batch_size": 8}, "train_images=3: expected at least 8"),
        ({"noise": -0.1}, "noise=-0.1: expected at least 0"),
        ({"noise": float("nan")}, "noise=nan"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GratingImagesDataModule(**options)
