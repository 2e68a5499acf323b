"""A picture of the losses of a run, for people who would rather look than read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn


class LossCurve(Callback):
    """Collects logged values and draws them as ``loss.png`` in the log folder when training ends.

    Args:
        train: Name of the value logged in ``training_step``.
        validation: Name of the value logged in ``validation_step``.
        baseline: Name of a logged value to draw as a horizontal line, if it is there.
        file: Name of the picture.
    """

    def __init__(
        self,
        train: str = "train_loss",
        validation: str = "val_loss",
        baseline: str | None = None,
        file: str = "loss.png",
    ) -> None:
        self.train = train
        self.validation = validation
        self.baseline = baseline
        self.file = file
        self.curves: dict[str, list[tuple[int, float]]] = {train: [], validation: []}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the training loss of the step."""
        self._keep(trainer, self.train)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the validation loss."""
        if not trainer.sanity_checking:
            self._keep(trainer, self.validation)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the picture and says how validation went."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        reached = self.curves[self.validation]
        baseline = trainer.callback_metrics.get(self.baseline) if self.baseline else None
        if reached:
            words = f"{self.validation}: {reached[0][1]:.4f} at step {reached[0][0]}"
            if len(reached) > 1:
                words += f", {reached[-1][1]:.4f} at step {reached[-1][0]}"
            if baseline is not None:
                words += f" ({self.baseline}: {float(baseline):.4f})"
            rank_zero_info(words)
        folder = trainer.loggers[0].log_dir if trainer.loggers else None
        self._draw(Path(folder or trainer.default_root_dir), baseline)

    def state_dict(self) -> dict[str, Any]:
        """The points so far, so that a resumed run draws the whole curve."""
        return {"curves": {name: [list(point) for point in points] for name, points in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the points of an earlier run."""
        for name, points in state_dict["curves"].items():
            self.curves[name] = [(int(step), float(value)) for step, value in points]

    def _keep(self, trainer: Trainer, name: str) -> None:
        value = trainer.callback_metrics.get(name)
        if value is not None:
            self.curves[name].append((trainer.global_step, float(value)))

    def _draw(self, folder: Path, baseline: Any) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            rank_zero_warn("LossCurve draws with matplotlib, which is not installed: pip install lightning-hetu[plot].")
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, style in ((self.train, {"alpha": 0.5, "linewidth": 1.0}), (self.validation, {"marker": "o"})):
            if self.curves[name]:
                steps, values = zip(*self.curves[name], strict=True)
                axes.plot(steps, values, label=name, **style)
        if baseline is not None:
            axes.axhline(float(baseline), color="gray", linestyle="--", label=self.baseline)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats)")
        axes.legend()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / self.file, dpi=120)
