"""Data loading processes: a stop signal is for the run, which ends them itself."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import signal

from utils import STOP_SIGNALS


class _LoadingProcess(multiprocessing.Process):
    """A data loading process that no stop signal can end before it ignores them: it starts with them blocked."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loading_context() -> multiprocessing.context.BaseContext:
    """The context in which DataLoader starts its processes."""
    context = copy.copy(multiprocessing.get_context())
    context.Process = _LoadingProcess
    return context


@atexit.register
def _end_loading_processes() -> None:
    """Kills the loading processes that are left: they ignore the signal with which multiprocessing would end them."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as failed
    for process in left:
        process.kill()
