"""The command ``lightning-hetu``: fit, validate, test, predict, plan, profile, consolidate.

All but ``consolidate`` are LightningCLI subcommands, configured by YAML and command line alike.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import lightning_hetu
from lightning_hetu.parallel.consolidate import consolidate
from lightning_hetu.planning.drawing import check_picture_name
from lightning_hetu.planning.osdp.picture import save_memory_picture
from lightning_hetu.planning.picture import save_picture
from lightning_hetu.strategies._offline import Target, comparison, plan_offline
from lightning_hetu.strategies._osdp_offline import comparison as osdp_comparison
from lightning_hetu.strategies._osdp_offline import plan_osdp_offline
from lightning_hetu.strategies._osdp_planner import OSDPRequest
from lightning_hetu.strategies._planner import PlanRequest
from lightning_hetu.strategies.auto import AutoHybridParallelStrategy
from lightning_hetu.strategies.osdp import OSDPStrategy

_DESCRIPTION = """Trains and runs a LightningModule under an automatically planned mix of parallelism. One more command
needs no configuration: lightning-hetu consolidate FOLDER FILE writes a checkpoint folder as one file for a plain
Trainer."""
_PATIENCE = 6.0
_REFUSED_OPTION = re.compile(r"^\s*- (\w+=.*: expected .*)$", re.MULTILINE)
_LOST_RANK = re.compile(r"connection (was )?(closed|reset)|broken pipe|socket timeout|timed out waiting", re.IGNORECASE)


class HetuTrainer(Trainer):
    """A Trainer that can also stop once the plan is known."""

    current: HetuTrainer | None = None
    """The one of this process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        HetuTrainer.current = self

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        out: str | None = None,
        picture: str | None = None,
        explain: bool = False,
        cluster: str | None = None,
        compare: list[str] | None = None,
        memory_budget: int | str | None = None,
        strategy: Literal["auto", "osdp"] | None = None,
        search_batch: bool = False,
    ) -> None:
        """Profiles, searches and shows the plan, without training.

        With ``cluster`` or ``compare`` nothing is run at all: the devices are known by name, and the model is only
        looked at, so it may be larger than this machine.

        Args:
            model: The module.
            datamodule: Its data.
            out: File to write the plan to, besides ``plan.json`` in the log folder.
            picture: File to draw the plan in, ``.svg`` or ``.png``.
            explain: Also show where the time and the memory of every stage go; with OSDP, what every single operator
                does.
            cluster: Name of a cluster to plan for instead of this machine: ``2x8xH100-80GB`` is two nodes of eight.
            compare: Names of clusters to show side by side, each optionally with the memory to use of a device:
                ``[8xA100-80GB, 8xA100-80GB@40GiB, 4xH100-80GB]``.
            memory_budget: Bytes of each device of ``cluster`` that the plan may use, or text such as ``70GiB``. By
                default 90 percent of its memory.
            strategy: With ``cluster`` or ``compare``, what to plan for instead of the strategy that is configured:
                hybrid parallelism (``auto``), or sharded data parallelism decided per operator (``osdp``).
            search_batch: With ``osdp`` and ``cluster`` or ``compare``, also find the batch size with the most samples
                per second; otherwise it is that of the data.
        """
        offline = cluster is not None or bool(compare)
        if strategy is not None and not offline:
            raise ValueError(
                f"strategy={strategy}: expected with cluster or compare; for this machine configure trainer.strategy."
            )
        if strategy == "osdp" or (strategy is None and isinstance(self.strategy, OSDPStrategy)):
            self._plan_osdp(model, datamodule, out, picture, cluster, compare, memory_budget, search_batch, explain)
            return
        if search_batch:
            raise ValueError("search_batch=true: expected with strategy=osdp and cluster or compare.")
        request = PlanRequest("auto", None, None, {}, True)
        if strategy is None or isinstance(self.strategy, AutoHybridParallelStrategy):
            request = self._auto_strategy("plan").request
        if picture is not None:
            check_picture_name(picture)
        if not offline:
            _refuse_budget(memory_budget, "memory_budget")
            planner = self._auto_strategy("plan")
            planner.stop_after_plan(plan_file=out)
            self.fit(model, datamodule=datamodule)
            if picture is not None and self.is_global_zero and planner.plan is not None:
                save_picture(planner.plan, picture)
            if explain and planner.cost_breakdown is not None:
                print(planner.cost_breakdown())
            return
        if request.memory_budget is not None and memory_budget is None:
            rank_zero_info(
                f"memory_budget={request.memory_budget} of the strategy is for this machine; the clusters have"
                " 90 percent of their memory, or what --memory_budget says."
            )
        names = [*([] if cluster is None else [cluster]), *(compare or [])]
        targets = [Target.parse(name, memory_budget) for name in names]
        plans = plan_offline(self, model, datamodule, request, targets)
        if cluster is not None:
            first = plans[0]
            if first.plan is None:
                raise ValueError(f"cluster={cluster}: {first.error}")
            print(first.plan.explain())
            print(first.speed())
            if explain and first.breakdown is not None:
                print(f"\n{first.breakdown()}")
            if out is not None:
                first.plan.save(out)
            if picture is not None:
                save_picture(first.plan, picture)
        if compare:
            print(comparison(plans))

    def _plan_osdp(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        out: str | None,
        picture: str | None,
        cluster: str | None,
        compare: list[str] | None,
        memory_budget: int | str | None,
        search_batch: bool,
        explain: bool,
    ) -> None:
        """The command ``plan`` for OSDP."""
        if picture is not None:
            check_picture_name(picture)
        if cluster is None and not compare:
            _refuse_budget(memory_budget, "memory_limit")
            if search_batch:
                raise ValueError("search_batch=true: expected with cluster or compare.")
            planner = self.strategy
            assert isinstance(planner, OSDPStrategy)
            planner.stop_after_plan(plan_file=out)
            self.fit(model, datamodule=datamodule)
            if planner.plan is not None and self.is_global_zero:
                if explain:
                    print(planner.plan.explain(each=True))
                if picture is not None:
                    save_memory_picture(planner.plan, picture)
            return
        request = self.strategy.request if isinstance(self.strategy, OSDPStrategy) else OSDPRequest()
        if request.memory_limit is not None and memory_budget is None:
            rank_zero_info(
                f"memory_limit={request.memory_limit} of the strategy is for this machine; the clusters have"
                " 90 percent of their memory, or what --memory_budget says."
            )
        names = [*([] if cluster is None else [cluster]), *(compare or [])]
        targets = [Target.parse(name, memory_budget) for name in names]
        plans = plan_osdp_offline(self, model, datamodule, request, targets, search_batch=search_batch)
        if cluster is not None:
            first = plans[0]
            if first.plan is None:
                raise ValueError(f"cluster={cluster}: {first.error}")
            print(first.plan.explain(each=explain))
            if out is not None:
                first.plan.save(out)
            if picture is not None:
                save_memory_picture(first.plan, picture)
        if compare:
            print(osdp_comparison(plans))

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


def _refuse_budget(memory_budget: int | str | None, name: str) -> None:
    if memory_budget is not None:
        raise ValueError(
            f"memory_budget={memory_budget}: expected with cluster; for this machine give"
            f" trainer.strategy.init_args.{name}."
        )


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

    def instantiate_classes(self) -> None:
        """Builds what the configuration names; a model that is only looked at gets no memory."""
        options: Any = self.config.get("plan") if self.subcommand == "plan" else None
        offline = options is not None and (options.get("cluster") or options.get("compare"))
        with torch.device("meta") if offline else contextlib.nullcontext():
            super().instantiate_classes()


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
        parser_kwargs={"description": _DESCRIPTION},
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
        _end_with(line)


def _end_with(line: str) -> NoReturn:
    """Ends all processes of this host with one line for all of them."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    launcher = HetuTrainer.current.strategy.launcher if HetuTrainer.current is not None else None
    if rank == 0 and launcher is not None:
        launcher.kill(signal.SIGKILL)
    elif rank > 0:
        # The first process ends this one if it has the same to say.
        time.sleep(_PATIENCE)
        line = f"process {rank}: {line}"
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
    package, standard = str(Path(lightning_hetu.__file__).parent), sysconfig.get_path("stdlib")
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame.filename for frame in traceback.extract_tb(cause.__traceback__)]
        if isinstance(cause, OSError):  # a file we could not open fails inside of the standard library
            frames = [name for name in frames if not name.startswith(standard) or "site-packages" in name]
        ours = bool(frames) and frames[-1].startswith(package)
        if ours and isinstance(cause, ValueError | OSError):
            return " ".join(str(cause).split())
        cause = cause.__cause__ or cause.__context__
    # The parser tries every type an option may have, and reports what each says; a class of ours names the option.
    refused = _REFUSED_OPTION.search(str(error))
    return refused[1] if refused is not None else None


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether a collective failed because a peer is gone, or something failed because of that."""
    while error is not None:
        if isinstance(error, RuntimeError) and _LOST_RANK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
