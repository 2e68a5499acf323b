"""The command ``lightning-hetu``: fit, validate, test, predict, plan, profile, consolidate.

All but ``consolidate`` are LightningCLI subcommands, configured by YAML and command line alike.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_hetu
from lightning_hetu.parallel.checkpoint import consolidate
from lightning_hetu.strategies.auto import AutoHybridParallelStrategy

_LOST_RANK = re.compile(r"connection (was )?(closed|reset)|broken pipe|socket timeout|timed out waiting", re.IGNORECASE)


class HetuTrainer(Trainer):
    """A Trainer that can also stop once the plan is known."""

    def plan(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, out: str | None = None
    ) -> None:
        """Profiles, searches and shows the plan, without training.

        Args:
            model: The module.
            datamodule: Its data.
            out: File to write the plan to, besides ``plan.json`` in the log folder.
        """
        strategy = self._auto_strategy("plan")
        strategy.stop_after_plan(plan_file=out)
        self.fit(model, datamodule=datamodule)

    def profile(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, out: str = "profiles"
    ) -> None:
        """Profiles the model and the devices, without searching or training.

        Args:
            model: The module.
            datamodule: Its data.
            out: Folder to write ``model.json`` and ``cluster.json`` to.
        """
        strategy = self._auto_strategy("profile")
        strategy.stop_after_profile(folder=out)
        self.fit(model, datamodule=datamodule)

    def _auto_strategy(self, command: str) -> AutoHybridParallelStrategy:
        if not isinstance(self.strategy, AutoHybridParallelStrategy):
            raise ValueError(
                f"trainer.strategy={type(self.strategy).__name__}: the command {command!r} needs"
                " lightning_hetu.AutoHybridParallelStrategy."
            )
        return self.strategy


class HetuCLI(LightningCLI):
    """LightningCLI with two more subcommands."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands and the arguments of their Trainer methods that the CLI itself provides."""
        return {
            **LightningCLI.subcommands(),
            "plan": {"model", "datamodule"},
            "profile": {"model", "datamodule"},
        }


def consolidate_command(folder: str, file: str) -> None:
    """Writes a checkpoint folder as one file that a plain Trainer loads.

    Args:
        folder: Checkpoint folder, for example ``runs/gpt/checkpoints/last.ckpt``.
        file: File to write, for example ``model.ckpt``.
    """
    path = consolidate(folder, file)
    logging.getLogger("lightning.pytorch").info("wrote %s (%d bytes)", path, path.stat().st_size)


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line, by default the process's own; errors are raised."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] == "consolidate":
        auto_cli(consolidate_command, args=words[1:], as_positional=True)
        return
    HetuCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=LightningModule,
        datamodule_class=LightningDataModule,
        trainer_class=HetuTrainer,
        save_config_kwargs={"overwrite": True},
        args=None if arguments is None else list(arguments),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point: an error that a user can act on is one line on stderr, and the exit status is 1."""
    try:
        run(arguments)
    except SIGTERMException:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            sys.stderr.write("stopped by SIGTERM; to go on, give --ckpt_path and a checkpoint.\n")
        raise
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        if int(os.environ.get("LOCAL_RANK", "0")) == 0 or is_lost_rank(error):
            sys.stderr.write(f"error: {line}\n")
            sys.stderr.flush()
        # not sys.exit: threads of a broken process group may hang while Python shuts down
        os._exit(1)


def one_line(error: BaseException) -> str | None:
    """What to tell the user about ``error`` in one line; ``None`` if it needs a traceback."""
    if is_lost_rank(error):
        return (
            "another process of this run has ended, so this one cannot go on. Resume with --ckpt_path and a checkpoint."
        )
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(lightning_hetu.__file__).parent)
    ours = bool(frames) and frames[-1].filename.startswith(package)
    if ours and isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    return None


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether a collective failed because a peer is gone, or something failed because of that."""
    while error is not None:
        if isinstance(error, RuntimeError) and _LOST_RANK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
