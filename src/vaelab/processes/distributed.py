"""Several processes that train one model: who each of them is, and how they stay of one mind.

Each has the whole model and its own rows of every batch. After a backward pass the gradients are averaged, so that all
take the same step; sums over the data, the wish to stop and the buffers of batch norm are agreed on in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shlex
import socket
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar, cast, final

import torch
from torch import Tensor
from torch import distributed as dist

from vaelab.errors import FailureError
from vaelab.processes.sharing import SharedMemory, Table, failures

T = TypeVar("T")

# What is exchanged is told apart by its count of values, as sums of these are exact in fp32; and what is no exchange.
_COUNTS = 2**12
_NO_COUNT = _COUNTS


def leads() -> bool:
    """Whether this process is the one that prints and writes: the first that torchrun has started, or the only one."""
    return _is_alone() or os.environ.get("RANK", "0") == "0"


def launched(words: Sequence[str]) -> str:
    """A command of vaelab as one types it, to be run by as many processes as this one is of."""
    if _is_alone():
        return shlex.join(["vaelab", *words])
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    one_machine = here == os.environ["WORLD_SIZE"]
    typed = shlex.join(["torchrun", *["--standalone"] * one_machine, "--nproc-per-node", here, "-m", "vaelab", *words])
    return typed if one_machine else f"{typed}, on each machine, with --nnodes and --rdzv-endpoint as before"


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


@final
class Team:
    """This process among those that train together.

    Args:
        rank: which it is, counted from 0; 0 leads.
        world: how many there are.
        memory: what the processes of one machine share; None sends everything as messages.
    """

    def __init__(self, rank: int = 0, world: int = 1, memory: SharedMemory | None = None) -> None:
        self.rank, self.world, self.memory = rank, world, memory
        self._wish = 0.0
        self._heard = 0.0
        self._messages: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def share_memory(self, count: int, kinds: int, device: torch.device) -> None:
        """Share room for ``count`` values of each process, where one machine has them all; called by all.

        Args:
            count: fp32 values of each process.
            kinds: how often as many values are there that all have in common.
            device: what they train on.

        Raises:
            FailureError: if another process has gone.
        """
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        able = device.type == "cpu" and sys.platform == "linux" and hasattr(os, "memfd_create")
        if not (1 < self.world <= SharedMemory.MOST and one_machine and able):
            return
        size, memory, table = SharedMemory.size(count, self.world, kinds), None, None
        given: list[tuple[str, bytes] | None] = [None]
        with contextlib.ExitStack() as stack:
            listening = None
            if self.leads:
                with contextlib.suppress(OSError):
                    # Without a name, so that nothing is left behind if a process is killed.
                    file = os.memfd_create("vaelab")
                    stack.callback(os.close, file)
                    os.posix_fallocate(file, 0, size)  # now, and not at the first write, which would be fatal
                    listening = stack.enter_context(socket.socket(socket.AF_UNIX))
                    listening.bind("")  # Linux chooses an address that is no file
                    listening.listen(self.world)
                    given = [(f"/proc/{os.getpid()}/fd/{file}", listening.getsockname())]
            with failures():
                dist.broadcast_object_list(given)
            if given[0] is not None:
                path, address = given[0]
                # RuntimeError: torch's, for a file that cannot be opened
                with contextlib.suppress(RuntimeError, OSError):
                    table = Table(leads=True) if self.leads else Table.at(address)
                    memory = SharedMemory(path, count, self.world, kinds, table)
            if not self.agree(memory is not None):
                if table is not None:
                    table.close()
                return
            if listening is not None and table is not None:
                table.seat(listening, self.world - 1)  # who wait there already
            self.memory = memory

    def ask(self, stop: bool) -> bool:
        """Ask all processes to stop, if ``stop``; returns whether any had asked before the last ``average_``.

        The wish travels with what is averaged anyway, so that all hear of it at the same place and none goes on alone.
        """
        self._wish = float(stop)
        return stop if self.world == 1 else self._heard > 0

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
        sizes = [value.numel() for value in values]
        rows = self.rows(sum(sizes), values[0])
        torch.cat([value.flatten() for value in values], out=self.own(rows))
        self.exchange_(rows)
        for value, piece in zip(values, mean_of(rows).split(sizes), strict=True):
            value.copy_(piece.view_as(value))

    def rows(self, count: int, like: Tensor) -> Tensor:
        """Where ``count`` values of each process go that are to be averaged (R, count), of this type and device.

        Each process writes its ``own`` row; after ``exchange_`` the mean of all R is that of the processes. Where they
        share memory, R is their number; where they send messages there is one row. They are for one exchange: the next
        asks again.
        """
        fp32_on_cpu = like.dtype == torch.float32 and like.device.type == "cpu"
        if self.memory is not None and fp32_on_cpu and count <= self.memory.count:
            return self.memory.rows(count)
        kind = count, like.dtype, like.device
        if kind not in self._messages:  # always the same: a GPU's compiled functions know where it lies
            self._messages[kind] = torch.zeros(count + 2, dtype=like.dtype, device=like.device)
        return self._messages[kind][None, :count]

    def own(self, rows: Tensor) -> Tensor:
        """The row (count,) that this process writes."""
        return rows[self.rank if len(rows) > 1 else 0]

    def exchange_(self, rows: Tensor) -> None:
        """Wait until all processes have written their rows; a row that is sent becomes their mean.

        Raises:
            FailureError: if another process has gone, or exchanges something else.
        """
        count, shared = rows.shape[1], len(rows) > 1
        about = self._wish, float(count % _COUNTS)
        if self.memory is not None:
            if shared and rows.data_ptr() != self.memory.rows(count).data_ptr():
                raise ValueError("these rows are of an exchange before: another process may still read them")
            # Whichever way the values go: who has others to exchange is met here too, and not waited for elsewhere.
            wishes, counted = self.memory.meet(*about)
            self._hear(wishes, counted, count)
        if not shared:
            message = self._messages[count, rows.dtype, rows.device]
            message[-2:] = torch.tensor(about)
            with failures():
                dist.all_reduce(message)
            wishes, counted = message[-2:].tolist()  # a GPU is waited for, once a step
            self._hear(wishes, counted, count)
            rows /= self.world

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """The sums of some numbers over the processes, which share memory: all wait until each has called this.

        Raises:
            FailureError: if another process has gone, or exchanges something else.
        """
        memory = cast(SharedMemory, self.memory)
        marks, *sums = memory.meet(float(_NO_COUNT), *numbers)
        self._require_same(marks, _NO_COUNT)
        return tuple(sums)

    def _hear(self, wishes: float, counted: float, count: int) -> None:
        self._require_same(counted, count % _COUNTS)
        self._heard = wishes

    def _require_same(self, heard: float, ours: int) -> None:
        if heard != ours * self.world:
            raise FailureError("the processes of this training are not at the same step: start them all again, "
                               "with --resume")  # fmt: skip

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


@contextlib.contextmanager
def team(device: torch.device) -> Generator[Team]:
    """Join the processes that ``torchrun`` has started, for the block; without it, a team of one.

    Raises:
        FailureError: if the others cannot be reached.
    """
    if _is_alone():
        yield Team()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL and the compiler take each process to be
    with failures():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # votes are on the CPU
    joined = Team(dist.get_rank(), dist.get_world_size())
    try:
        yield joined
        joined.wait()  # none leaves while another still listens to it
    finally:
        if joined.memory is not None:
            joined.memory.close()
        dist.destroy_process_group()


def mean_of(rows: Tensor) -> Tensor:
    """The mean of the rows (R, C), of two in a quarter of the time that torch's takes."""
    return rows[0] if len(rows) == 1 else functools.reduce(torch.add, rows.unbind()).div_(len(rows))
