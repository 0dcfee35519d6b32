"""Signals that ask a run to save and stop."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

# Names of the signals on which a run saves and stops. A closed terminal or a lost connection sends
# SIGHUP, which Windows does not have.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class StopSignals:
    """Inside this context, each of `STOP_SIGNALS` sets `signum`, and a second SIGINT kills.

    SIGTERM and SIGHUP stay ignored if they are already ignored, as SIGHUP is with nohup.
    """

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
            if signum != signal.SIGINT and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            try:
                self._previous[signum] = signal.signal(signum, self._handle)
            except ValueError:  # only the main thread may set signal handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        # Not print: the signal may interrupt a print, which is not reentrant.
        with contextlib.suppress(OSError):  # stdout is closed
            os.write(1, b"\nstopping after this step; once more (Ctrl-C) to stop at once\n")
