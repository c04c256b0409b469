"""Memory that the processes of one machine share, for what they average each step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch import distributed as dist

from vaelab.distributed import Team, failures


@final
class SharedMemory:
    """Room for some fp32 values of each process: to send megabytes to a neighbour takes ten times as long.

    Values of one average lie in one half, those of the next in the other: who writes again into the first has heard
    that all have read it.

    Args:
        path: of a file in memory, of ``size`` bytes.
        size: of both halves together.
        world: processes that write.
    """

    LEAST = 16_384  # values: fewer take no longer as a message
    MOST = 8  # processes: each reads what all have written, and many would do better in turns

    def __init__(self, path: str, size: int, world: int) -> None:
        self._halves = torch.from_file(path, shared=True, size=size // 4).view(2, world, -1)
        self._turn = 0

    @classmethod
    def among(cls, team: Team, count: int, device: torch.device) -> SharedMemory | None:
        """Room for ``count`` values of each process, where one machine has them all; else None. Called by all.

        Raises:
            FailureError: if another process has gone.
        """
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(team.world)
        worth = device.type == "cpu" and count >= cls.LEAST
        if not (1 < team.world <= cls.MOST and one_machine and worth and hasattr(os, "memfd_create")):
            return None
        size, memory = 2 * team.world * count * 4, None
        path: list[str | None] = [None]
        with contextlib.ExitStack() as stack:
            if team.leads:
                with contextlib.suppress(OSError):
                    # Without a name, so that nothing is left behind if a process is killed.
                    file = os.memfd_create("vaelab")
                    stack.callback(os.close, file)
                    os.posix_fallocate(file, 0, size)  # now, and not at the first write, which would be fatal
                    path = [f"/proc/{os.getpid()}/fd/{file}"]
            with failures():
                dist.broadcast_object_list(path)
            if path[0] is not None:
                with contextlib.suppress(RuntimeError):  # torch's, for a file that cannot be opened
                    memory = cls(path[0], size, team.world)
            return memory if team.agree(memory is not None) else None

    def fits(self, values: Sequence[Tensor]) -> bool:
        """Whether there is room for these, and it is worth it."""
        fp32_on_cpu = all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values)
        return fp32_on_cpu and self.LEAST <= sum(len(value) for value in values) <= self._halves.shape[-1]

    def rows(self, count: int) -> Tensor:
        """Where each process writes (world, count); another half at each call."""
        self._turn = 1 - self._turn
        return self._halves[self._turn, :, :count]
