"""Images to train a classifier on without a download: gratings, whose direction and width are the class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_hetu.data.loaders import global_batches


class GratingImages(Dataset[dict[str, Tensor]]):
    """Sine gratings of random phase and contrast under noise. Image ``i`` is the same in every process and epoch.

    Args:
        count: Number of images.
        num_classes: Classes: directions, at two widths where the number is even.
        image_size: Height and width in pixels.
        channels: Color channels.
        noise: Standard deviation of the noise; a grating has an amplitude of 0.5 to 1.
        seed: Of everything that is random.
    """

    def __init__(self, count: int, num_classes: int, image_size: int, channels: int, noise: float, seed: int) -> None:
        self.count = count
        self.num_classes = num_classes
        self.image_size = image_size
        self.channels = channels
        self.noise = noise
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``pixel_values``, float32 ``[channels, image_size, image_size]``, and ``labels``, an int64 scalar."""
        # torch's generator on the CPU looks at 32 bits of a seed
        seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        label = int(torch.randint(self.num_classes, (), generator=generator))
        widths = 2 if self.num_classes % 2 == 0 else 1
        direction = math.pi * (label // widths) / (self.num_classes // widths)
        waves = 2.0 if label % widths == 0 else 4.0
        phase, contrast = torch.rand(2, generator=generator).tolist()
        place = torch.linspace(0, 2 * math.pi, self.image_size)
        along = math.cos(direction) * place[None, :] + math.sin(direction) * place[:, None]
        grating = (0.5 + 0.5 * contrast) * torch.sin(waves * along + 2 * math.pi * phase)
        noise = torch.randn(self.channels, self.image_size, self.image_size, generator=generator)
        return {"pixel_values": grating + self.noise * noise, "labels": torch.tensor(label)}


class GratingImagesDataModule(LightningDataModule):
    """Batches ``{"pixel_values": [batch, channels, size, size], "labels": [batch]}`` of :class:`GratingImages`.

    Args:
        num_classes: Number of classes.
        image_size: Height and width in pixels.
        channels: Color channels.
        train_images: Images per epoch.
        val_images: Images of a validation; none of them is trained on.
        batch_size: The GLOBAL batch size: samples per step over all devices together, as on a single device.
        noise: Standard deviation of the noise.
        seed: Of images and their order.
        num_workers: Processes that load data, per device.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        channels: int = 3,
        train_images: int = 4096,
        val_images: int = 512,
        batch_size: int = 32,
        noise: float = 0.5,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        least = {"num_classes": 2, "image_size": 2, "channels": 1, "batch_size": 1, "noise": 0, "num_workers": 0}
        self.save_hyperparameters()
        for name, low in {**least, "train_images": batch_size, "val_images": batch_size}.items():
            if not self.hparams[name] >= low:
                raise ValueError(f"{name}={self.hparams[name]}: expected at least {low}.")
        options: dict[str, Any] = {
            "num_classes": num_classes, "image_size": image_size, "channels": channels, "noise": noise,
        }  # fmt: skip
        self.training = GratingImages(train_images, seed=2 * seed, **options)
        self.validation = GratingImages(val_images, seed=2 * seed + 1, **options)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches; a last incomplete one is dropped."""
        return self._loader(self.training, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The images of a validation in their order; a last incomplete batch is dropped."""
        return self._loader(self.validation, shuffle=False)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The same as for validation."""
        return self._loader(self.validation, shuffle=False)

    def _loader(self, images: GratingImages, shuffle: bool) -> DataLoader[dict[str, Tensor]]:
        return global_batches(
            images,
            self.trainer,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=True,
            seed=self.seed,
            num_workers=self.num_workers,
        )
