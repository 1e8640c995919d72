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
    """Scalars and pictures in folder/tensorboard, on the main process; nothing elsewhere.

    What is there of steps from `start_step` on is dropped first.
    """

    def __init__(self, folder: Path, start_step: int = 0):
        self.writer: SummaryWriter | None = None
        if not is_main_process():
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --help or --eval

        # Its thread prints a traceback where it cannot write; the error comes up again in ours, as one line.
        threading.excepthook = _quiet_about_files
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def machine(self, images_per_second: float, peak_memory: int, step: int) -> None:
        """Speed, and memory in bytes: what hangs on the machine, and is another each time a run is repeated.

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
    """log.txt (one JSON line an epoch) and TensorBoard, on the main process; nothing elsewhere.

    Lines of epochs from `start_epoch` on, and events from `start_step` on, are dropped first: a resumed run writes
    them anew.
    """

    def __init__(self, folder: Path, start_epoch: int, start_step: int):
        self.path = folder / "log.txt"
        if is_main_process():
            # One line an epoch from epoch 0 on, so what comes after is of epochs done again, or was cut short.
            lines = self.path.read_text().splitlines(keepends=True) if start_epoch and self.path.exists() else []
            write_text(self.path, "".join(lines[:start_epoch]))
        super().__init__(folder, start_step)

    def epoch(self, values: dict[str, Any], step: int) -> None:
        """Appends the epoch's values to log.txt as a JSON line and to TensorBoard; prints those of evaluations."""
        if "top1" in values:
            say(" ".join(f"{key} {value:.5g}" for key, value in values.items()))
        if self.writer is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self.scalars({key: value for key, value in values.items() if key != "epoch"}, step)
