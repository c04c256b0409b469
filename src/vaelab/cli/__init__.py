"""The command line. Nothing heavy is imported to print help: torch loads when a command starts to work."""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints

from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff

from vaelab import __version__
from vaelab.cli.common import later, parse, refuse_repeated_lists, refuse_unknown_flags
from vaelab.cli.comparing import compare
from vaelab.cli.diagnosing import doctor
from vaelab.cli.exploring import explore
from vaelab.cli.measuring import evaluate
from vaelab.cli.refitting import refit
from vaelab.cli.reproducing import reproduce
from vaelab.cli.shipping import export, report
from vaelab.cli.showing import animate, draw, interpolate, reconstruct, sample, traverse
from vaelab.cli.training import recipes, run_training, train
from vaelab.cli.tuning import tune_latent
from vaelab.errors import FailureError, InterruptedRun, UsageError, did_you_mean
from vaelab.own import import_parts

log = logging.getLogger("vaelab")

_INTERRUPTED = InterruptedRun.code
_TAGLINE = "vaelab trains, measures, explains and ships variational autoencoders."

COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": recipes,
    "train": train,
    "refit": refit,
    "evaluate": evaluate,
    "doctor": doctor,
    "compare": compare,
    "sample": sample,
    "reconstruct": reconstruct,
    "traverse": traverse,
    "interpolate": interpolate,
    "animate": animate,
    "draw": draw,
    "explore": explore,
    "report": report,
    "export": export,
    "reproduce": reproduce,
    "tune-latent": tune_latent,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed), 2 (wrong usage), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no "±" is to show the number beside it
            stream.reconfigure(errors="replace")
    try:
        try:
            _dispatch(arguments)
        except SystemExit as stop:  # after --help, or rich's own in place of a BrokenPipeError
            if isinstance(stop.__context__, BrokenPipeError):
                raise stop.__context__ from None
            if stop.code:
                raise
        print(end="", flush=True)  # here, not when the interpreter ends, where nothing is caught any more
        return 0
    except (UsageError, FailureError) as error:
        return _complain(error, error.code)
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _complain("not enough memory: a smaller network, --batch-size or --image-size needs less", 1)
    except OSError as error:
        return _complain(f"{error.filename or 'the output'}: {error.strerror or error}", 1)


def _dispatch(arguments: list[str]) -> None:
    parts, arguments = _taken_out(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return
    if arguments[0] == "--version":
        print(f"vaelab {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}{did_you_mean(name, COMMANDS)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("vaelab").setLevel(logging.INFO)
    computes = name != "recipes" and not {"-h", "--help"} & set(rest)
    others = _give_way() if computes and "torch" not in sys.modules else 0
    import_parts(parts)
    if name == "train":
        run_training(rest, others)
    else:
        command = COMMANDS[name]
        hints = get_type_hints(command, include_extras=True)
        parameters = inspect.signature(command).parameters.values()
        flags = [p.name.replace("_", "-") for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY]
        refuse_unknown_flags(rest, {f"--{flag}" for flag in (*flags, "help")})
        refuse_repeated_lists(rest, {f"--{flag}": hints[flag.replace("-", "_")] for flag in flags})
        parse(later(command), rest, f"vaelab {name}", config=(FlagCreatePairsOff,))()


def _taken_out(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What ``--parts`` names, before the command or after it, and all other words."""
    parts, rest, left = list[str](), list[str](), iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag != "--parts":
            rest.append(argument)
        elif (name := value if equals else next(left, "")) and not name.startswith("-"):
            parts.append(name)
        else:
            raise UsageError("--parts is empty: name a file that registers parts of your own")
    return parts, rest


def _give_way() -> int:
    """Where other programs compute, let threads that wait for each other sleep soon; to be called before torch loads.

    By default such a thread spins until its turn on the core is over, and has to wait for another when the others come.
    On two cores beside one other program a step of ``fast`` took 35 ms on two threads, 19 with this, and 14 on one
    thread (means, one-off; 9, 12 and 13 on a quiet machine). Returns how many others there are, if it was looked for.
    """
    if (os.cpu_count() or 1) == 1 or "OMP_NUM_THREADS" in os.environ or (others := others_computing()) == 0:
        return 0
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return others


def others_computing(moments: int = 3) -> int:
    """How many other threads of this machine want a core, at the least of some moments; 0 where that is not known."""
    found: list[int] = []
    try:
        for _ in range(moments):
            time.sleep(0.01)
            running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
            found.append(int(running) - 1)  # this one
    except (OSError, IndexError, ValueError):
        return 0
    return max(0, min(found))


def _print_help() -> None:
    console = Console(highlight=False, markup=False)  # the brackets of a usage are no tags
    console.print(f"{_TAGLINE}\n\nusage: vaelab COMMAND ...\n")
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"  {name}", (command.__doc__ or "").splitlines()[0])
    console.print(table)
    console.print("\nvaelab COMMAND --help says more; vaelab --version prints the version.")
    console.print("vaelab --parts FILE COMMAND ... knows the parts and recipes that a file of yours registers.")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be had; on the CPU torch says so in words alone."""
    named = type(error).__name__ == "OutOfMemoryError"  # of torch, which is loaded only when a command works
    return isinstance(error, MemoryError) or named or "DefaultCPUAllocator" in str(error)


def _complain(error: object, code: int) -> int:
    several = os.environ.get("WORLD_SIZE", "1") != "1"  # that torchrun has started
    rank = os.environ.get("RANK") if several else None
    if code != _INTERRUPTED or rank in (None, "0"):  # all are interrupted alike: one says so
        of = f" (process {rank})" if rank is not None and code != _INTERRUPTED else ""
        print(f"vaelab{of}: {error}", file=sys.stderr)
    return code
