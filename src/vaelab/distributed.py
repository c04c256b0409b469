"""Several processes that train one model: who each of them is, and how they stay of one mind.

Each has the whole model and its own rows of every batch. After a backward pass the gradients are averaged, so that all
take the same step; sums over the data, the wish to stop and the buffers of batch norm are agreed on in the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist

from vaelab.errors import FailureError

T = TypeVar("T")


def leads() -> bool:
    """Whether this process is the one that prints and writes: the first that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Room(Protocol):
    """Memory that all processes write into and read."""

    def fits(self, values: Sequence[Tensor]) -> bool:
        """Whether there is room for these, and it is worth it."""
        ...

    def rows(self, count: int) -> Tensor:
        """Where each process writes (world, count); what the last call but one returned is written over."""
        ...


@final
class Team:
    """This process among those that train together.

    Args:
        rank: which it is, counted from 0; 0 leads.
        world: how many there are.
        memory: what the processes of one machine share; None sends everything as messages.
    """

    def __init__(self, rank: int = 0, world: int = 1, memory: Room | None = None) -> None:
        self.rank, self.world, self.memory = rank, world, memory
        self._wish, self._heard = 0.0, torch.zeros(())

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def ask(self, stop: bool) -> bool:
        """Ask all processes to stop, if ``stop``; returns whether any had asked before the last ``average_``.

        The wish travels with what is averaged anyway, so that all hear of it at the same place and none goes on alone.
        """
        self._wish = float(stop)
        return stop if self.world == 1 else bool(self._heard > 0)

    def agree(self, able: bool) -> bool:
        """Whether all processes are able.

        Raises:
            FailureError: if another process has gone.
        """
        votes = torch.full((1,), float(able))
        self.average_(votes)
        return bool(votes == 1)

    def average_(self, *values: Tensor) -> None:
        """Replace values by their mean over the processes, the sum divided by their number; all in one message.

        Raises:
            FailureError: if another process has gone, or averages something else.
        """
        if self.world == 1:
            return
        flat = [value.flatten() for value in values]
        count = sum(len(value) for value in flat)
        about = torch.tensor([self._wish, count % 2**12], device=flat[0].device)  # exact in fp32
        if self.memory is not None and self.memory.fits(flat):
            rows = self.memory.rows(count)
            torch.cat(flat, out=rows[self.rank])
            _sum(about)  # which comes when all have written
            mean = torch.add(rows[0], rows[1])
            for row in rows[2:]:
                mean += row
        else:
            message = torch.cat([*flat, about])
            _sum(message)
            mean, about = message[:-2], message[-2:]
        self._heard, counted = about
        if not mean.is_cuda and counted != count % 2**12 * self.world:  # a GPU would have to be waited for
            raise FailureError("the processes of this training are not at the same step: start them all again, "
                               "with --resume")  # fmt: skip
        mean /= self.world
        for value, piece in zip(values, mean.split([len(value) for value in flat]), strict=True):
            value.copy_(piece.view_as(value))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of some parameters, all in one message.

        ``DistributedDataParallel`` is not used: it counts on one backward pass that reaches every parameter, and a
        step with two losses for two groups of them has none such.
        """
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            self.average_(*gradients)

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Take these values over from the process that leads."""
        if self.world > 1:
            with failures():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            with failures():
                dist.barrier()

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """This process's part of some work."""
        return itertools.islice(items, self.rank, None, self.world)


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
    with failures():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # votes are on the CPU
    joined = Team(dist.get_rank(), world)
    try:
        yield joined
        joined.wait()  # none leaves while another still listens to it
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def failures() -> Generator[None]:
    """Say of an error inside the block that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise FailureError(
            f"another process of this training has gone ({str(error).splitlines()[0]}): start them all again, "
            "with --resume"
        ) from error


def _sum(values: Tensor) -> None:
    with failures():
        dist.all_reduce(values)
