"""Run ``vaelab`` and die by SIGKILL: ``killed.py WHERE ARGUMENTS...``.

WHERE is ``step:N`` (in the middle of step N, gradients taken and weights not stepped), ``rank1:N`` (the same, of several
processes the second alone) or ``write:N`` (in the N-th write of ``last.pt``, the temporary file written and not renamed).
"""

import os
import signal
import sys

from vaelab.cli import main
from vaelab.runs import checkpoint
from vaelab.training import trainer


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(number):
    original = trainer.Trainer._descend

    def descend(self, names):
        if self.step == number:
            die()
        return original(self, names)

    trainer.Trainer._descend = descend


def kill_rank1_in_step(number):
    if os.environ["RANK"] == "1":
        kill_in_step(number)


def kill_in_write(number):
    original, seen = os.replace, [0]

    def replace(source, target):
        if str(target).endswith("last.pt"):
            seen[0] += 1
            if seen[0] == number:
                die()
        original(source, target)

    checkpoint.os.replace = replace


if __name__ == "__main__":
    where, count = sys.argv[1].split(":")
    {"step": kill_in_step, "rank1": kill_rank1_in_step, "write": kill_in_write}[where](int(count))
    sys.exit(main(sys.argv[2:]))
