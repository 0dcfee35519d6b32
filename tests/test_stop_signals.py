"""Signals that make a run save and stop."""

import os
import signal

import pytest

from hjepa_jax.errors import Interrupted
from hjepa_jax.training.stop_signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_each_stop_signal_stops_the_run_with_its_status(name, capfd):
    signum = getattr(signal, name)
    outside = signal.signal(signum, signal.default_int_handler)  # the tests may run under nohup
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signum)
            assert stop.signum == signum
        assert signal.getsignal(signum) == signal.default_int_handler
    finally:
        signal.signal(signum, outside)
    assert "stopping after this step" in capfd.readouterr().out
    assert Interrupted(signum, 3).status == 128 + signum
    assert str(Interrupted(signum, 3)) == f"{name} at step 3"


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)
