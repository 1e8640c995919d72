"""The log of a run: log.txt and TensorBoard."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import write_text
from utils import is_main_process, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


def _quiet_about_files(problem: threading.ExceptHookArgs) -> None:
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


class TensorBoard:
    """Writes scalars and pictures to folder/tensorboard, on the main process only.

    Events there from `start_step` on are dropped first.
    """

    def __init__(self, folder: Path, start_step: int = 0):
        self.writer: SummaryWriter | None = None
        if not is_main_process():
            return
        from torch.utils.tensorboard import SummaryWriter  # here, because it is slow to import

        # Its thread would print a traceback if it cannot write; our thread meets the same error and shows one line.
        threading.excepthook = _quiet_about_files
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def machine(self, images_per_second: float, peak_memory: int, step: int) -> None:
        """Logs speed, and memory in bytes, under machine/: they differ each time that a run is repeated.

        The speed is 0 for an epoch that was resumed after its last step.
        """
        values = {"images_per_second": images_per_second, "peak_memory_MiB": peak_memory / 2**20}
        self.scalars({f"machine/{name}": value for name, value in values.items()}, step)

    def figure(self, name: str, draw: Callable[[], Figure], step: int) -> None:
        if self.writer is not None:
            self.writer.add_figure(name, draw(), step)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class RunLog(TensorBoard):
    """Writes log.txt (one JSON line per epoch) and TensorBoard, on the main process only.

    Lines from `start_epoch` on and events from `start_step` on are dropped first, since a resumed run writes them
    again.
    """

    def __init__(self, folder: Path, start_epoch: int, start_step: int):
        self.path = folder / "log.txt"
        if is_main_process():
            # One line per epoch from epoch 0 on; what follows is of epochs that are run again, or incomplete.
            lines = self.path.read_text().splitlines(keepends=True) if start_epoch and self.path.exists() else []
            write_text(self.path, "".join(lines[:start_epoch]))
        super().__init__(folder, start_step)

    def epoch(self, values: dict[str, Any], step: int, shown: bool = True) -> None:
        """Appends the values of an epoch to log.txt and TensorBoard, and prints them if they are to be shown."""
        if shown:
            say(" ".join(f"{key} {value:.5g}" for key, value in values.items()))
        if self.writer is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self.scalars({key: value for key, value in values.items() if key != "epoch"}, step)
