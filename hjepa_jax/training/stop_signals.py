"""Signals that ask a run to save and stop."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

# Signals on which a run saves and stops, by name, as Windows lacks SIGHUP: a closed terminal or a
# lost connection sends it.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class StopSignals:
    """Within the context `STOP_SIGNALS` ask to stop, by `signum`; a second SIGINT kills.

    SIGHUP keeps being ignored where the caller ignores it, as nohup does.
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
            except ValueError:  # not the main thread: signals are not ours to handle
                break
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        # Not by print: the step may be in the middle of one, which cannot be entered again.
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(1, b"\nstopping after this step; once more (Ctrl-C) to stop at once\n")
