"""Fixtures. MNIST-dependent tests skip with a message where it cannot be had; all others run offline."""

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from pathlib import Path

# Before torch is loaded, and for every process that a test starts: models this small are slower on two threads than on
# one, much slower on a busy machine, and results depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_OPT"] = "0"  # compiling UMAP takes longer than its few points

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from vaelab import own, slots
from vaelab.data import Dataset, load
from vaelab.errors import FailureError
from vaelab.evaluate.features import train_extractor
from vaelab.measuring import extractors
from vaelab.processes.sharing import SharedMemory, Table
from vaelab.recipes import RECIPES
from vaelab.training import stepping


@pytest.fixture(autouse=True)
def _quiet_log():
    """A test that runs the command line sets up logging; undo it."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="session", autouse=True)
def extractor_cache(tmp_path_factory):
    """A cache folder (``$XDG_CACHE_HOME``) for feature extractors, of short training: the user's is left alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "user_cache_path", lambda *_, **__: folder / "vaelab")
        patch.setattr(extractors, "train_extractor", functools.partial(train_extractor, epochs=1))
        yield folder


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps are traced, and what the compiler would be given runs as it is: compiling each would take a minute."""
    for module in ("training.compiling", "train"):
        monkeypatch.setattr(f"vaelab.{module}.can_compile", lambda device: True)
    monkeypatch.setattr(stepping, "compile_graph", lambda graph, inputs, options: graph)


@pytest.fixture
def shared(tmp_path):
    """What processes of one machine share, without the processes."""
    with contextlib.ExitStack() as stack:

        def among(world, count=20_000, kinds=0):
            path = tmp_path / f"memory-{len(list(tmp_path.iterdir()))}"
            path.write_bytes(bytes(SharedMemory.size(count, world, kinds)))
            pairs = [socket.socketpair() for _ in range(1, world)]
            tables = [Table(leads=True, sockets=[one for one, _ in pairs])]
            tables += [Table(leads=False, sockets=[other]) for _, other in pairs]
            for table in tables:
                stack.callback(table.close)
            return [SharedMemory(str(path), count, world, kinds, table) for table in tables]

        yield among


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    try:
        return load("mnist")
    except FailureError as error:
        pytest.skip(f"MNIST cannot be had here: {error}")


@pytest.fixture
def nothing_registered(monkeypatch):
    """What a test registers and imports as a part is forgotten when it ends."""
    monkeypatch.setattr(slots, "_added", {slot: {} for slot in slots.SLOTS})
    monkeypatch.setattr(slots, "_names", {})
    recipes_before = dict(RECIPES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(own.PARTS, "")
    before = set(sys.modules)
    yield
    slots.recipes_added.clear()
    RECIPES.clear()
    RECIPES.update(recipes_before)
    for file in map(Path, filter(None, os.environ[own.PARTS].split(os.pathsep))):
        if file.stem not in before:
            sys.modules.pop(file.stem, None)
