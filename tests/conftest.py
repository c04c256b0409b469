"""Fixtures. MNIST-dependent tests skip with a message where it cannot be had; all others run offline."""

import logging
import os
import signal

# Before torch is loaded, and for every process that a test starts: models this small are slower on two threads than on
# one, much slower on a busy machine, and results depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from vaelab import compiling, stepping
from vaelab.data import Dataset, load
from vaelab.errors import FailureError


@pytest.fixture(autouse=True)
def _quiet_log():
    """A test that runs the command line sets up logging; undo it."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps are traced, and what the compiler would be given runs as it is: compiling each would take a minute."""
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    monkeypatch.setattr(stepping, "compile_graph", lambda graph, inputs, options: graph)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    try:
        return load("mnist")
    except FailureError as error:
        pytest.skip(f"MNIST cannot be had here: {error}")
