"""One of two processes that train with moving experts; the second one dies in the middle of a move."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from lightning_hetu.callbacks import FlexMoEPlacement
from tests.moe._training import fit
from tests.moe.test_flexmoe import EAGER, MODULE, TRAINER


class SaveThenDie(Callback):
    """Saves after an epoch of two steps; from then on the second process dies when it is to send experts."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch != 0:
            return
        trainer.save_checkpoint(f"{self.folder}/before.ckpt")
        if trainer.global_rank == 1:
            dist.batch_isend_irecv = lambda operations: os._exit(9)


if __name__ == "__main__":
    folder = sys.argv[1]
    flex = FlexMoEPlacement(**{**EAGER, "policy": "eplb", "max_ops": None})
    fit(
        int(os.environ["RANK"]), folder, ranks=2, module=MODULE, trainer=TRAINER, dtype=torch.float64,
        callbacks=(flex, SaveThenDie(folder)),
    )  # fmt: skip
