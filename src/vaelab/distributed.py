"""Several processes that train one model: who each of them is, and how they stay of one mind.

Each has the whole model and its own rows of every batch. After a backward pass the gradients are averaged, so that all
take the same step; sums over the data, the wish to stop and the buffers of batch norm are agreed on in the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist

from vaelab.errors import FailureError

T = TypeVar("T")


def leads() -> bool:
    """Whether this process is the one that prints and writes: the first that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@final
class Team:
    """This process among those that train together.

    Args:
        rank: which it is, counted from 0; 0 leads.
        world: how many there are.
        memory: what the processes of one machine share; None sends everything as messages.
    """

    def __init__(self, rank: int = 0, world: int = 1, memory: SharedMemory | None = None) -> None:
        self.rank, self.world, self._memory = rank, world, memory
        self._wish, self._heard = 0.0, torch.zeros(1)

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def share_memory(self, count: int) -> None:
        """Let up to ``count`` fp32 values be averaged in memory that all processes see, where one machine has them all.

        Raises:
            FailureError: if another process has gone.
        """
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        if 1 < self.world <= SharedMemory.MOST and one_machine and SharedMemory.HOME.is_dir():
            with _failures():
                self._memory = SharedMemory.among(self.rank, self.world, count)

    def ask(self, stop: bool) -> bool:
        """Ask all processes to stop, if ``stop``; returns whether any had asked before the last ``average_``.

        The wish travels with what is averaged anyway, so that all hear of it at the same place and none goes on alone.
        """
        self._wish = float(stop)
        return stop if self.world == 1 else bool(self._heard > 0)

    def average_(self, values: Tensor) -> Tensor:
        """Replace values by their mean over the processes: the sum, divided by their number.

        Raises:
            FailureError: if another process has gone.
        """
        if self.world > 1:
            wish = torch.full((1,), self._wish, dtype=values.dtype, device=values.device)
            with _failures():
                if self._memory is not None and self._memory.fits(values):
                    flat, rows = values.view(-1), self._memory.rows(values)
                    torch.div(flat, self.world, out=rows[self.rank])
                    dist.all_reduce(wish)  # whose answer comes when all have written
                    torch.add(rows[0], rows[1], out=flat)
                    for row in rows[2:]:
                        flat += row
                    self._heard = wish
                else:
                    message = torch.cat([values.flatten(), wish])
                    dist.all_reduce(message)
                    values.copy_(message[:-1].view_as(values) / self.world)
                    self._heard = message[-1:]
        return values

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of a group, all in one message.

        ``DistributedDataParallel`` is not used: it counts on one backward pass that reaches every parameter, and a
        step with two losses for two groups of them has none such.
        """
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            flat = self.average_(torch.cat([gradient.flatten() for gradient in gradients]))
            pieces = flat.split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Take these values over from the process that leads."""
        if self.world > 1:
            with _failures():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            with _failures():
                dist.barrier()

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """This process's part of some work."""
        return itertools.islice(items, self.rank, None, self.world)


@final
class SharedMemory:
    """Memory that processes of one machine write their values into: to send some megabytes takes ten times as long.

    Values of one ``average_`` lie in one half, those of the next in the other: who writes again into the first has
    heard that all have read it.

    Args:
        path: of a file in memory, of ``size`` bytes.
        size: of both halves together.
        world: processes that write.
    """

    HOME = Path("/dev/shm")  # noqa: S108 (the file is made by tempfile)
    LEAST = 16_384  # values: fewer take no longer as a message
    MOST = 8  # processes: each reads what all have written, and many would do better in turns

    def __init__(self, path: Path, size: int, world: int) -> None:
        self._halves = torch.from_file(str(path), shared=True, size=size // 4).view(2, world, -1)
        self._turn = 0

    @classmethod
    def among(cls, rank: int, world: int, count: int) -> SharedMemory | None:
        """Room for ``count`` values of each; called by all, None for all where the first finds no room."""
        size = 2 * world * count * 4
        with contextlib.ExitStack() as stack:
            path: list[str | None] = [None]
            if rank == 0:
                with contextlib.suppress(OSError):
                    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="vaelab-", dir=cls.HOME))
                    os.posix_fallocate(file.fileno(), 0, size)  # now, and not at the first write, which would be fatal
                    path = [file.name]
            dist.broadcast_object_list(path)
            if path[0] is None:
                return None
            memory = cls(Path(path[0]), size, world)
            dist.barrier()  # all have it: the name can go, and nothing is left behind if a process is killed
        return memory

    def fits(self, values: Tensor) -> bool:
        """Whether there is room for these, and it is worth it."""
        fp32_on_cpu = values.dtype == torch.float32 and values.device.type == "cpu" and values.is_contiguous()
        return fp32_on_cpu and self.LEAST <= values.numel() <= self._halves.shape[-1]

    def rows(self, values: Tensor) -> Tensor:
        """Where each process writes (world, values); another half at each call."""
        self._turn = 1 - self._turn
        return self._halves[self._turn, :, : values.numel()]


@runtime_checkable
class Moving(Protocol):
    """A part of a model that moves by what it saw in a step, as averages do, and not by a gradient."""

    def move(self, team: Team) -> None:
        """Move by what the last training batch showed, that of all processes together; called after each step."""
        ...


@contextlib.contextmanager
def team(device: torch.device) -> Generator[Team]:
    """Join the processes that ``torchrun`` has started, for the block; without it, a team of one.

    Raises:
        FailureError: if the others cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Team()
        return
    with _failures():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    joined = Team(dist.get_rank(), world)
    try:
        yield joined
        joined.wait()  # none leaves while another still listens to it
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _failures() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FailureError(
            f"another process of this training has gone ({str(error).splitlines()[0]}): start them all again, "
            "with --resume"
        ) from error
