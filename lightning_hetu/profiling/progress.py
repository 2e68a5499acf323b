"""Shows how far a profile has come: one bar, in the first process only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from lightning_hetu.profiling._agreement import rank_and_size

ProgressCallback = Callable[[int, int, str], None]
"""Called with the steps done, the steps in total, and what is being measured now."""


class ProgressBar:
    """A bar that the profilers drive: ``with ProgressBar("profiling") as bar: profile_model(..., progress=bar)``.

    Args:
        title: Text in front of the bar.
        enabled: ``None`` shows it in the first process when the error stream is a terminal.
    """

    def __init__(self, title: str, *, enabled: bool | None = None) -> None:
        if enabled is None:
            enabled = rank_and_size()[0] == 0 and sys.stderr.isatty()
        self.title = title
        self.enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, done: int, total: int, description: str) -> None:
        """Moves the bar to ``done`` of ``total``."""
        if not self.enabled:
            return
        if self._bar is None:
            # Not a dependency of torch; without it the profile simply runs without a bar.
            try:
                from tqdm.auto import tqdm
            except ImportError:
                self.enabled = False
                return
            self._bar = tqdm(total=total, desc=self.title, leave=False)
        self._bar.total = total
        self._bar.n = done
        self._bar.set_postfix_str(description, refresh=False)
        self._bar.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
