"""Memory that the processes of one machine share, for what they average each step."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Generator, Sequence
from typing import final

import torch
from torch import Tensor

from vaelab.errors import LostProcessError, first_line


@final
class SharedMemory:
    """Room for some fp32 values of each process: to send megabytes to a neighbour takes ten times as long.

    Values of one average lie in one half, those of the next in the other, and they meet in between: who writes again
    into the first half has met all others after they had read it.

    Beside it there is room for values that all have in common, such as weights, of which each changes its own part.

    Args:
        path: of a file in memory, of ``size(...)`` bytes.
        count: values of each process, and of each kind that they have in common.
        world: processes that write.
        kinds: of values that they have in common.
        table: where they meet.
    """

    MOST = 8  # processes: each reads what all have written, and many would do better in turns

    def __init__(self, path: str, count: int, world: int, kinds: int, table: Table) -> None:
        whole = torch.from_file(path, shared=True, size=self.size(count, world, kinds) // 4).view(-1, count)
        self._halves, self._common = whole[: 2 * world].view(2, world, count), whole[2 * world :]
        self._turn, self._table = 0, table
        self._adopted: list[Tensor] = []
        self.count, self.kinds = count, kinds

    @staticmethod
    def size(count: int, world: int, kinds: int) -> int:
        """The bytes of it all."""
        return 4 * count * (2 * world + kinds)

    def rows(self, count: int) -> Tensor:
        """Where each process writes (world, count) until they meet, and reads until they meet again."""
        return self._halves[self._turn, :, :count]

    def meet(self, *numbers: float) -> tuple[float, ...]:
        """Wait until all processes have called this; the sums of their numbers.

        Raises:
            FailureError: if another process has gone.
        """
        self._turn = 1 - self._turn
        return self._table.meet(numbers)

    def adopt(self, *kinds: Sequence[Tensor]) -> list[Tensor]:
        """Move tensors into what all have in common; they keep their shapes, and lie as those of the first kind.

        Called by all processes, whose tensors hold the same values. From then on one's change is everybody's: no two
        may change the same value, and none may read it before they have met.

        Args:
            kinds: of each kind as many tensors of fp32 without gaps, of the same shapes, ``count`` numbers at most.

        Returns:
            Of each kind one vector of all, tensor after tensor, each in the order in which it lies in memory.
        """
        found: list[Tensor] = []
        strides = [tensor.stride() for tensor in kinds[0]]
        for tensors, room in zip(kinds, self._common, strict=True):
            filled = 0
            for tensor, stride in zip(tensors, strides, strict=True):
                place = room[filled : filled + tensor.numel()].as_strided(tensor.shape, stride)
                tensor.data = place.copy_(tensor.detach())
                filled += tensor.numel()
            self._adopted += tensors
            found.append(room[:filled])
        return found

    def release(self) -> None:
        """Give adopted tensors memory of their own again, with the values that they have."""
        for tensor in self._adopted:
            tensor.data = tensor.detach().clone()
        self._adopted.clear()

    def close(self) -> None:
        """Meet no more; whoever still waits for this process is told that it has gone."""
        self._table.close()


@final
class Table:
    """Where the processes of one machine meet: each has a socket to the one that leads, which has one to each.

    That takes some microseconds, where a message by way of the network's layers may take a millisecond.

    Args:
        leads: whether this process does.
        sockets: from the leading process to each of the others, or from another to the leading one.
    """

    def __init__(self, leads: bool, sockets: Sequence[socket.socket] = ()) -> None:
        self._leads, self._sockets = leads, list(sockets)

    @classmethod
    def at(cls, address: bytes) -> Table:
        """The table to which the leading process listens at ``address``."""
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(address)
        except OSError:
            stream.close()
            raise
        return cls(leads=False, sockets=[stream])

    def seat(self, listening: socket.socket, count: int) -> None:
        """Take in ``count`` others that have connected, but nobody else: any user of the machine can."""
        user = struct.Struct("3i")
        while len(self._sockets) < count:
            stream = listening.accept()[0]
            _, uid, _ = user.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, user.size))
            if uid == os.getuid():
                self._sockets.append(stream)
            else:
                stream.close()

    def close(self) -> None:
        """Close all sockets."""
        for stream in self._sockets:
            stream.close()

    def meet(self, numbers: Sequence[float]) -> tuple[float, ...]:
        """Sum each of some numbers over all processes, exactly where their sums are exact in fp64.

        Raises:
            FailureError: if another process has gone.
        """
        form = struct.Struct(f"{len(numbers)}d")
        with failures():
            if not self._leads:
                self._send(form.pack(*numbers))
            heard = [form.unpack(self._receive(stream, form.size)) for stream in self._sockets]
            if not self._leads:
                return heard[0]
            sums = tuple(map(sum, zip(numbers, *heard, strict=True)))
            self._send(form.pack(*sums))
            return sums

    def _send(self, message: bytes) -> None:
        for stream in self._sockets:
            stream.sendall(message)

    @staticmethod
    def _receive(stream: socket.socket, size: int) -> bytes:
        message = stream.recv(size, socket.MSG_WAITALL)
        if len(message) < size:
            raise ConnectionResetError("connection closed by peer")
        return message


@contextlib.contextmanager
def failures() -> Generator[None]:
    """Say of an error inside the block that another process has gone.

    Raises:
        LostProcessError: in place of what a socket or ``torch.distributed`` raises.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise LostProcessError(
            f"another process of this training has gone ({first_line(error)}): start them all again, with --resume"
        ) from error
