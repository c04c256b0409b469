"""Several processes that train one model: who each of them is, and how they stay of one mind.

Each has the whole model and its own rows of every batch. After a backward pass the gradients are averaged, so that all
take the same step; sums over the data, the wish to stop and the buffers of batch norm are agreed on in the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator
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

    def fits(self, values: Tensor) -> bool:
        """Whether there is room for these, and it is worth it."""
        ...

    def rows(self, values: Tensor) -> Tensor:
        """Where each process writes (world, values); what was returned before keeps what it has until the next call."""
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
        self._wish, self._heard = 0.0, torch.zeros(1)

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

    def average_(self, values: Tensor) -> Tensor:
        """Replace values by their mean over the processes: the sum, divided by their number.

        Raises:
            FailureError: if another process has gone.
        """
        if self.world > 1:
            wish = torch.full((1,), self._wish, dtype=values.dtype, device=values.device)
            with failures():
                if self.memory is not None and self.memory.fits(values):
                    flat, rows = values.view(-1), self.memory.rows(values)
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
