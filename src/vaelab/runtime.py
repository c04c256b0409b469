"""Devices, precision, and randomness as a function of (seed, stream, step).

No random number of a training run comes from hidden state. Each is drawn from a generator that is seeded by what the
number is for, so a resumed run needs only its weights, its optimizer, its step and what its objective keeps, and any
step can be replayed alone.

Shapes: B batch (the first axis of everything drawn here).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from vaelab.errors import UsageError, first_line

Precision = Literal["auto", "fp32", "bf16"]


def derived_seed(*key: int | str) -> int:
    """Hash a key of integers and names into 64 bits (``SeedSequence``: close keys give unrelated seeds)."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` whose numbers depend on ``key`` alone."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


STEPS = 64  # whose seeds are hashed together
MOST_THREADS = 1024  # where more cannot be started, OpenMP ends the process without a word


@functools.lru_cache(maxsize=64)
def _step_seeds(seed: int, stream: str, block: int) -> list[int]:
    """The seeds of a stream for ``STEPS`` steps in a row: one a step, when caches are cold, takes six times as long."""
    return [derived_seed(seed, stream, block * STEPS + i) for i in range(STEPS)]


Sampler = Callable[..., Tensor]
"""``torch.randn`` or ``torch.rand``."""


class Noise(ABC):
    """Where every random number of training and evaluation comes from.

    ``stream`` names what the numbers are for (``"z"``, ``"binarize"``, ...): two streams are independent, and the same
    stream asked twice at one step gives the same numbers. The first axis of ``shape`` is the batch.
    """

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of this shape."""
        return self.drawn(torch.randn, stream, shape)

    def uniform(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) of this shape."""
        return self.drawn(torch.rand, stream, shape)

    @abstractmethod
    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """What the sampler makes for this stream, of this shape."""


@final
@dataclass(frozen=True)
class StepNoise(Noise):
    """The noise of one training step, drawn for the global batch and sliced for this process.

    With ``world`` processes each asks for its own B rows; the draw is of ``world * B`` rows, of which it gets the
    ``rank``-th block: one process and N processes see the same numbers.

    Args:
        seed: the run's seed.
        step: the training step, counted from 0.
        device: where the numbers are drawn. Another kind of device draws other numbers of the same distribution.
        rank: this process.
        world: the number of processes.
    """

    seed: int
    step: int
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """This rank's rows of the global draw."""
        count, *rest = shape
        block, place = divmod(self.step, STEPS)
        key = torch.Generator(self.device).manual_seed(_step_seeds(self.seed, stream, block)[place])
        rows = sampler([count * self.world, *rest], generator=key, device=self.device)
        return rows if self.world == 1 else rows[self.rank * count : (self.rank + 1) * count]


@final
@dataclass(frozen=True)
class RowNoise(Noise):
    """Noise that belongs to the rows of a data set, not to the batches that it is read in.

    Row ``i`` gets the same numbers whatever the batch size, so an evaluation does not depend on how it was cut.

    Args:
        seed: a constant of the protocol (never the run's seed).
        first_row: the index in the data set of the batch's first row.
        device: where the numbers are drawn.
    """

    seed: int
    first_row: int = 0
    device: torch.device | str = "cpu"
    # Rows are drawn in blocks, because seeding a generator for every single row would cost more than drawing from it.
    block: int = 256

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """The numbers of these rows."""
        start, stop = self.first_row, self.first_row + shape[0]
        first_block = start // self.block
        blocks = [
            sampler(
                [self.block, *shape[1:]],
                generator=generator(self.seed, stream, index, device=self.device),
                device=self.device,
            )
            for index in range(first_block, -(-stop // self.block))
        ]
        offset = start - first_block * self.block
        return torch.cat(blocks)[offset : offset + shape[0]]


@final
class SampleNoise(Noise):
    """A window on noise that is drawn for many samples per example: samples ``first``, ``first + 1``, ... of ``total``.

    Posteriors ask for noise of shape (batch, samples, ...). Cut into windows, five thousand samples of an image fit in
    the processor's cache, and are the same numbers as in one piece.

    Args:
        noise: where the numbers come from.
        total: samples per example in all.
    """

    def __init__(self, noise: Noise, total: int) -> None:
        self._noise, self._total, self.first = noise, total, 0
        self._drawn: dict[tuple[Sampler, str, tuple[int, ...]], Tensor] = {}

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """The numbers of this window's samples."""
        key = sampler, stream, (shape[0], self._total, *shape[2:])
        if key not in self._drawn:
            self._drawn[key] = self._noise.drawn(*key)
        return self._drawn[key][:, self.first : self.first + shape[1]]


@final
class ChosenNoise(Noise):
    """Some of the noise that is drawn for many samples per example: the samples ``index`` (B, J) of ``total``.

    Args:
        noise: where the numbers come from.
        total: samples per example in all.
        index: which ones, of each example.
    """

    def __init__(self, noise: Noise, total: int, index: Tensor) -> None:
        self._noise, self._total, self._index = noise, total, index

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """The numbers of the chosen samples."""
        whole = self._noise.drawn(sampler, stream, (shape[0], self._total, *shape[2:]))
        index = self._index.reshape(*self._index.shape, *(1 for _ in shape[2:]))
        return whole.gather(1, index.expand(-1, -1, *shape[2:]))


def epoch_order(size: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The order in which an epoch visits the data: a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(size, generator=generator(seed, "order", epoch)).to(device)


def reseed(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Reseed torch's global generator: dropout and torch's distributions draw from there and accept no other."""
    _seed(derived_seed(seed, "dropout", step, rank), device)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Generator[None]:
    """Let torch's global generators, the CPU's and the device's, start from a seed in the block; then restore them.

    Weights are first drawn from there, and so is ``Distribution.sample``, which accepts no other generator.
    """
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):  # pyright: ignore[reportUnknownMemberType]
        for one in (torch.device("cpu"), *devices):
            _seed(seed, one)
        yield


def _seed(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: it also queues a call, with a formatted stack trace, for each backend that is not in use.
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def eval_mode(*modules: torch.nn.Module) -> Generator[None]:
    """Dropout and batch norm as in evaluation, inside the block; then each module has the mode that it had."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.train(training)


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that is there.

    Of several GPUs ``auto`` and ``cuda`` take the one of this process, as torchrun counts those of a machine.

    Raises:
        UsageError: if the name is unknown or the device is not on this machine.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        own = int(os.environ.get("LOCAL_RANK", "0")) if count > 1 else 0  # of one, a launcher shows each its own
        if own >= count:
            raise UsageError(f"no GPU is left for process {own}: start {count} at most, or give --device cpu")
        return torch.device("cuda", own)
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = first_line(error)
        raise UsageError(f"--device {name} cannot be used here ({why}); --device auto takes what there is") from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here: a GPU with bf16, a CPU with AMX, or AMD's with AVX-512.

    AVX-512's bf16 instruction takes two products at once, but Intel's processors issue it so seldom that bf16 products
    take 1.4 to 1.7 times as long as fp32 ones. (They have AMX for them, which a virtual machine may hide.)
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = cpu_flags()
    full_rate = "avx512_bf16" in flags and _cpu_field("vendor_id") == "AuthenticAMD"
    return device.type == "cpu" and ("amx_bf16" in flags or full_rate)


def prefers_onednn(device: torch.device) -> bool:
    """Whether oneDNN's fp32 products are faster than MKL's here: a CPU of AMD's with AVX-512 units of 512 bits (Zen 5).

    MKL takes AVX2 on it. Where the units are of 256 bits (Zen 4, and Zen 5 of laptops) both are as fast.
    """
    wide = _cpu_field("vendor_id") == "AuthenticAMD" and int(_cpu_field("cpu family") or 0) >= 26
    return device.type == "cpu" and wide and "avx512f" in cpu_flags() and torch.backends.mkldnn.is_available()


def resolve_precision(requested: Precision, device: torch.device, bf16_gap: float | None) -> Literal["fp32", "bf16"]:
    """Choose the arithmetic of matrix products and convolutions; sums, losses and weights stay in fp32.

    ``auto`` takes bf16 where the device is fast at it and the recipe's committed results show that bf16 changes the
    test objective by less than 0.3 nats; else fp32.

    Args:
        requested: what the user asked for.
        device: the computing device.
        bf16_gap: |bf16 - fp32| of the recipe's test objective in nats, as measured; None if never measured.
    """
    if requested != "auto":
        return requested
    proven = bf16_gap is not None and abs(bf16_gap) < 0.3
    return "bf16" if proven and has_fast_bf16(device) else "fp32"


def widened(x: Tensor) -> Tensor:
    """Numbers of half precision in fp32, others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is asked for next; elsewhere nothing happens.

    A step asks for the same megabytes as the one before. By default glibc may take each piece from the system anew,
    which clears it page by page: a third of the time of a compiled convolutional step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its largest: smaller pieces are not mapped one by one
        mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: so much may lie free


@contextlib.contextmanager
def denormals_flushed() -> Generator[None]:
    """Let results below the smallest normal number (1e-38 in fp32) be zero inside of the block, on every thread.

    What has no gradient for a few hundred steps, such as the weights of pixels that are always black, has moments in
    Adam that decay through these numbers, and a processor may take a hundred cycles for each. XLA does the same.
    """
    before = bool(torch.tensor(1e-30) * 1e-10 == 0)
    _flush_denormals(True)
    try:
        yield
    finally:
        _flush_denormals(before)


def _flush_denormals(on: bool) -> None:
    if not torch.set_flush_denormal(on) or sys.platform != "linux":
        return

    def flush(_: int | None) -> None:
        torch.set_flush_denormal(on)

    # Threads have the setting of the one that starts them; torch's own may have been started before. They are reached
    # through the library that runs them, if it is the one that torch's wheels bring along.
    with contextlib.suppress(OSError):
        openmp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(flush)
        openmp.GOMP_parallel(work, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


@contextlib.contextmanager
def threads(count: int | None) -> Generator[int]:
    """Compute with ``count`` CPU threads inside the block (None: leave as is), then restore what was set.

    Raises:
        UsageError: if there are more than ``MOST_THREADS``.
    """
    if count is not None and count > MOST_THREADS:
        raise UsageError(f"--threads {count}: must be at most {MOST_THREADS}, and is best at most {os.cpu_count()}")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device) -> str:
    """Name the processor that computes, for the records: its model and, for a CPU, torch's thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{cpu_name()}, {count} thread{'s' if count > 1 else ''}"


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_field(name: str) -> str | None:
    """What the system says of its first processor, where it says it."""
    fields = (line.partition(":") for line in _cpu_info().splitlines())
    return next((value.strip() for key, _, value in fields if key.strip() == name), None)


def cpu_flags() -> set[str]:
    """What the system says that the first processor can do."""
    return set((_cpu_field("flags") or "").split())


def cpu_name() -> str:
    """The processor's model, as it calls itself."""
    return _cpu_field("model name") or platform.processor() or platform.machine()
