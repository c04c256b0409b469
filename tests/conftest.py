"""Fixtures. MNIST-dependent tests skip with a message where it cannot be had; all others run offline."""

import logging

import pytest
import torch

from vaelab.data import Dataset, load
from vaelab.errors import FailureError


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    """The same bits wherever the suite runs: results depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet_log():
    """A test that runs the command line sets up logging; undo it."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    try:
        return load("mnist")
    except FailureError as error:
        pytest.skip(f"MNIST cannot be had here: {error}")
