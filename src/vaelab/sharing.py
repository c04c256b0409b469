"""Memory that the processes of one machine share, for what they average each step."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
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

    HOME = Path("/dev/shm")  # noqa: S108 (the file is made by tempfile)
    LEAST = 16_384  # values: fewer take no longer as a message
    MOST = 8  # processes: each reads what all have written, and many would do better in turns

    def __init__(self, path: Path, size: int, world: int) -> None:
        self._halves = torch.from_file(str(path), shared=True, size=size // 4).view(2, world, -1)
        self._turn = 0

    @classmethod
    def among(cls, team: Team, count: int) -> SharedMemory | None:
        """Room for ``count`` values of each process, where one machine has them all; else None. Called by all.

        Raises:
            FailureError: if another process has gone.
        """
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(team.world)
        if not (1 < team.world <= cls.MOST and one_machine and cls.HOME.is_dir()):
            return None
        size, path = 2 * team.world * count * 4, [None]
        with failures(), contextlib.ExitStack() as stack:
            if team.leads:
                with contextlib.suppress(OSError):
                    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="vaelab-", dir=cls.HOME))
                    os.posix_fallocate(file.fileno(), 0, size)  # now, and not at the first write, which would be fatal
                    path = [file.name]
            dist.broadcast_object_list(path)
            if path[0] is None:
                return None
            memory = cls(Path(path[0]), size, team.world)
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
