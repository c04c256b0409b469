"""The command line. Nothing heavy is imported to print help: torch loads when a command starts to work."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional

from vaelab import __version__
from vaelab.config import Run, flat, override, slots_with_choice, spec_names
from vaelab.errors import FailureError, UsageError, did_you_mean
from vaelab.recipes import RECIPES, recipe

if TYPE_CHECKING:
    from vaelab.data import Dataset
    from vaelab.models import VAE

_TAGLINE = "vaelab trains, measures, explains and ships variational autoencoders."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed), 2 (wrong usage), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UsageError as error:
        return _complain(error, 2)
    except FailureError as error:
        from vaelab.train import InterruptedRun

        return _complain(error, 130 if isinstance(error, InterruptedRun) else 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0
    if arguments[0] == "--version":
        print(f"vaelab {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}{did_you_mean(name, COMMANDS)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("vaelab").setLevel(logging.INFO)
    if name == "train":
        _train(rest)
    else:
        command = COMMANDS[name]
        known = {f"--{parameter.replace('_', '-')}" for parameter in inspect.signature(command).parameters}
        _refuse_unknown_flags(rest, known - {"--run"} | {"--help"})
        tyro.cli(command, args=rest, prog=f"vaelab {name}", config=(FlagCreatePairsOff,))
    return 0


def _print_help() -> None:
    console = Console()
    console.print(f"{_TAGLINE}\n\nusage: vaelab COMMAND ...\n", highlight=False)
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"  {name}", (command.__doc__ or "").splitlines()[0])
    console.print(table, highlight=False)
    console.print("\nvaelab COMMAND --help says more; vaelab --version prints the version.", highlight=False)


def _complain(error: object, code: int) -> int:
    print(f"vaelab: {error}", file=sys.stderr)
    return code


# --- recipes and train ----------------------------------------------------------------------------------------------


def recipes() -> None:
    """List the recipes: what each reproduces, its published numbers, its cost."""
    table = Table.grid(padding=(0, 2))
    for name, entry in RECIPES.items():
        published = ", ".join(f"{key} {value:.2f}" for key, value in entry.published.items())
        facts = [f"source {entry.source}", f"{entry.cost} on one CPU core"]
        facts += [f"published (MNIST test, nats): {published}"] if published else []
        table.add_row(f"[bold]{name}", entry.title)
        table.add_row("", f"[dim]{'; '.join(facts)}")
    Console().print(table, highlight=False)


def train() -> None:
    """Train a recipe: vaelab train RECIPE [--data mnist|digits|freyfaces|PATH] [--out DIR] [--resume] [any setting]."""


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        Console().print(f"usage: vaelab train RECIPE ...\n\n{train.__doc__}\n", highlight=False, markup=False)
        recipes()
        Console().print("\nvaelab train RECIPE --help lists a recipe's settings.", highlight=False)
        return
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-"):
        raise UsageError(f"the recipe comes first: vaelab train RECIPE {name} ...; choose one of {', '.join(RECIPES)}")
    base = recipe(name)
    if "--resume" in rest:
        # Parsed with the folder's own settings as defaults: what is not given on the command line is the folder's, and
        # what is given and differs is found.
        from vaelab.folder import RunFolder

        folder = _folder_asked_for(base, rest)
        base = RunFolder.open(folder).run
        if base.recipe != name:
            raise UsageError(f"{folder} holds a run of {base.recipe}, not of {name}")
    run, out, resume = _parse(_choose_parts(base, rest), rest)
    _fit(run, Path(out) if out else _default_folder(run.recipe, run.data.source, run.training.seed), resume)


def _folder_asked_for(run: Run, arguments: Sequence[str]) -> Path:
    """The run folder that a command line means, before it is parsed."""
    out = _value(arguments, "--out")
    data, seed = _value(arguments, "--data") or run.data.source, _value(arguments, "--seed") or run.training.seed
    return Path(out) if out else _default_folder(run.recipe, data, seed)


def _default_folder(name: str, data: str, seed: int | str) -> Path:
    return Path(f"runs/{name}-{Path(data).stem}-s{seed}")


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The value that is given to a flag, as ``--flag value`` or ``--flag=value``; the last one counts."""
    found: str | None = None
    for i, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name == flag and (given or i + 1 < len(arguments)):
            found = value if given else arguments[i + 1]
    return found


def _fit(run: Run, folder: Path, resume: bool) -> None:
    from vaelab import pictures
    from vaelab.folder import RunFolder
    from vaelab.progress import Display
    from vaelab.train import InterruptedRun, fit, load_data, with_absolute_path

    run = with_absolute_path(run)
    if resume:
        run = RunFolder.open(folder).reconcile(run)
    else:
        RunFolder.create(folder)  # refuses a folder that is taken before any data are loaded
    data = load_data(run)
    say = logging.getLogger("vaelab").info
    say("%s on %s: %d/%d/%d images for training/validation/test, into %s", run.recipe, data.name,
        len(data.train), len(data.validation), len(data.test), folder)  # fmt: skip
    try:
        model = fit(run, data, out=folder, resume=resume, on_epoch_end=[pictures.draw_each_epoch], display=Display())
    except InterruptedRun as error:
        raise InterruptedRun(f"{error}; go on with: vaelab train {run.recipe} --out {folder} --resume") from error
    history, state = RunFolder.open(folder).history(), RunFolder.open(folder).load_last()
    if not history or state is None:
        raise FailureError(f"{folder} has lost its history.jsonl or last.pt: its pictures cannot be drawn")
    last = history[-1]
    best_epoch = last["epoch"] if state["best"] is None else state["best"][1]
    pictures.draw_at_end(run, model, data, history, best_epoch, folder)
    say("epoch %d, validation: distortion %.2f + rate %.2f nats per image", last["epoch"],
        last["validation_distortion"], last["validation_rate"])  # fmt: skip
    say("done; test numbers: vaelab evaluate %s", folder)


def _choose_parts(run: Run, arguments: Sequence[str]) -> Run:
    """Apply the flags that choose a part (``--optimizer adamw``): they decide which other flags there are."""
    chosen: dict[str, str] = {}
    for slot in slots_with_choice():
        if (word := _value(arguments, f"--{slot}")) is not None:
            chosen[slot] = word
    current = {slot: getattr(run, slot).word for slot in chosen if getattr(run, slot) is not None}
    return override(run, **{slot: word for slot, word in chosen.items() if current.get(slot) != word})


def _refuse_unknown_flags(arguments: Sequence[str], known: set[str]) -> None:
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise UsageError(f"no flag {flag}{did_you_mean(flag, known)}")


def _parse(run: Run, arguments: Sequence[str]) -> tuple[Run, str | None, bool]:
    """Parse a recipe's flags, which are the run's own settings by their flat names."""
    leaves = flat(run)
    fields: list[Any] = []
    for name, leaf in leaves.items():
        flag = name.replace("_", "-")
        aliases = ["--" + alias.replace("_", "-") for alias in leaf.aliases]
        annotation = Annotated[leaf.type, tyro.conf.arg(name=flag, help=leaf.help, aliases=aliases)]
        fields.append((name, annotation, dataclasses.field(default=leaf.value)))
    for slot in slots_with_choice():
        words = Optional[Literal[tuple(spec_names(slot))]]  # pyright: ignore[reportInvalidTypeForm] # noqa: UP045
        part = getattr(run, slot)
        help = f"kind of {slot.replace('_', ' ')}" + ("" if part is not None else " (default: by the data's channels)")
        annotation = Annotated[words, tyro.conf.arg(name=f"{slot}", help=help)]
        fields.append((f"{slot}_kind", annotation, dataclasses.field(default=None if part is None else part.word)))
    fields.append(
        ("out", Annotated[str | None, tyro.conf.arg(help="run folder; default: runs/RECIPE-DATA-sSEED")], None)
    )
    flags_known = {f"--{name}" for name in ("out", "resume", "help", "no-resume", *slots_with_choice())}
    for name, leaf in leaves.items():
        words = [name.replace("_", "-"), *(alias.replace("_", "-") for alias in leaf.aliases)]
        flags_known |= {
            f"--{prefix}{word}" for word in words for prefix in ("", "no-") if not prefix or leaf.type is bool
        }
    _refuse_unknown_flags(arguments, flags_known)
    fields.append(("resume", Annotated[bool, tyro.conf.arg(help="go on with the run in that folder")], False))
    flags = dataclasses.make_dataclass("Flags", fields)
    entry = RECIPES[run.recipe]
    parsed = tyro.cli(
        flags,
        args=list(arguments),
        prog=f"vaelab train {run.recipe}",
        description=f"{entry.title} (source: {entry.source})",
    )
    changes = {name: getattr(parsed, name) for name, leaf in leaves.items() if getattr(parsed, name) != leaf.value}
    return override(run, **changes), parsed.out, parsed.resume


# --- commands on a run ----------------------------------------------------------------------------------------------

RunPath = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN", help="a run folder")]
Output = Annotated[Path | None, tyro.conf.arg(help="the file to write; default: one in the run folder")]


def evaluate(run: RunPath, /, split: Literal["train", "validation", "test"] = "test", num_samples: int = 1,
             json: bool = False) -> None:  # fmt: skip
    """Measure a run: negative ELBO, distortion, rate, with protocol and standard error; writes metrics.json.

    Args:
        split: the images to score.
        num_samples: posterior samples per image.
        json: print JSON instead of a table.
    """
    from vaelab import evaluate as measure
    from vaelab.checkpoint import read_json, write_json

    if num_samples < 1:
        raise UsageError(f"--num-samples {num_samples}: must be at least 1")
    config, model, data = _opened(run)
    estimates = measure.evaluate(model, config, data, split, num_samples)
    floor = None if model.is_density(binary_data=data.binary) else measure.grey_floor(data.split(split))
    result = {"cross_entropy_floor": floor, "metrics": {name: e.to_json() for name, e in estimates.items()}}
    about = {
        "recipe": config.recipe,
        "beta": config.objective.beta,
        "data": data.record(),
        "weights_sha256": hashlib.sha256((run / "best_model.pth").read_bytes()).hexdigest(),
    }
    path = run / "metrics.json"
    before = read_json(path) if path.exists() else {}
    # What was measured on other splits stays, as long as it was the same weights on the same data.
    splits = before["splits"] if before | about == before and "splits" in before else {}
    write_json(path, {**about, "splits": {**splits, split: result}})
    if json:
        print(_json({**about, "split": split, **result}))
        return
    console = Console()
    protocol = next(iter(estimates.values())).protocol
    console.print(f"{run}: {protocol}", highlight=False, soft_wrap=True)
    table = Table(box=None)
    for column in ("", "value", "s.e.", "unit", "n"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    names = {"negative_elbo": "-ELBO (distortion + rate)", "objective": f"distortion + {config.objective.beta:g} rate"}
    for name, estimate in estimates.items():
        numbers = (f"{estimate.value:.2f}", f"{estimate.stderr:.2f}", estimate.unit, f"{estimate.n:,}")
        table.add_row(names.get(name, name), *numbers)
    console.print(table, highlight=False)
    if floor is not None:
        console.print(f"Cross-entropy on grey pixels is no likelihood, and cannot go below {floor:.2f} nats here "
                      "(the mean entropy of the pixels).", highlight=False)  # fmt: skip


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2)


def sample(run: RunPath, /, num: int = 64, seed: int = 0, out: Output = None) -> None:
    """Draw images from the prior: z ~ p(z), mean of p(x|z), as one PNG.

    Args:
        num: how many.
        seed: another seed draws other images.
        out: the PNG to write; default: RUN/sample-seedN.png.
    """
    from vaelab import figures, pictures
    from vaelab.train import load_model

    if num < 1:
        raise UsageError(f"--num {num}: must be at least 1")
    target = _target(run, out, f"sample-seed{seed}.png")
    _write(
        target,
        pictures.png(figures.samples(load_model(run), num, seed=seed, title=f"{run.name}: samples, seed {seed}")),
    )


def reconstruct(run: RunPath, /, images: str | None = None, split: Literal["train", "validation", "test"] = "test",
                num: int = 30, out: Output = None) -> None:  # fmt: skip
    """Show images and their reconstructions, as one PNG.

    Args:
        images: a folder or array of your own images, of the size that the run was trained on; default: the run's data.
        split: the run's images to take.
        num: how many, from the first on.
        out: the PNG to write; default: RUN/reconstruct-SPLIT.png.
    """
    from vaelab import figures, pictures
    from vaelab.data.sources import NAMED, Reading, find
    from vaelab.train import load_model

    if num < 1:
        raise UsageError(f"--num {num}: must be at least 1")
    if images is None:
        _, model, data = _opened(run)
        batch, _ = next(data.batches(split, num))
        x, what = batch.x, split
    else:
        import torch

        from vaelab.data.datasets import unit

        model, config = load_model(run), _config(run)
        channels, height, width = model.shape
        size = (height, width) if Path(images).is_dir() else None  # the images of a folder are scaled and cropped
        wanted = 3 if channels == 3 else 1
        pool = find(images, Reading() if images in NAMED else Reading(size, wanted, config.data.value_range))
        if pool.train.x.shape[1:] != model.shape:
            raise UsageError(
                f"--images {images}: images of {pool.train.x.shape[1:]}, the run was trained on {model.shape}"
            )
        x, what = unit(torch.from_numpy(pool.train.x[:num])), Path(images).stem
    target = _target(run, out, f"reconstruct-{what}.png")
    title = f"{run.name}: images ({what}) and their reconstructions"
    _write(target, pictures.png(figures.reconstructions(model, x, title=title)))


def animate(run: RunPath, /, digits: str = "19", frames: int = 16, out: Output = None) -> None:
    """Move through latent space from class to class: a GIF through the codes of real images.

    Args:
        digits: the classes to pass through, in order; the walk returns to the first.
        frames: frames from one to the next.
        out: the GIF to write; default: RUN/animate-DIGITS.gif.
    """
    from vaelab import pictures

    if not 1 <= frames <= 500:
        raise UsageError(f"--frames {frames}: must be from 1 to 500")
    target = _target(run, out, f"animate-{digits}.gif")
    _, model, data = _opened(run)
    _write(target, pictures.animation(model, data, digits, frames=frames))


COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": recipes,
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "animate": animate,
}


def _config(run: Path) -> Run:
    from vaelab.folder import RunFolder

    return RunFolder.open(run).run


def _opened(run: Path) -> tuple[Run, VAE, Dataset]:
    """A run's configuration, model and data, the data checked to be those that it was trained on."""
    from vaelab.folder import RunFolder
    from vaelab.train import load_data, load_model, require_same_data

    model, folder = load_model(run), RunFolder.open(run)
    data = load_data(folder.run)
    require_same_data(folder, data)
    return folder.run, model, data


def _target(run: Path, out: Path | None, name: str) -> Path:
    from vaelab.folder import RunFolder

    RunFolder.open(run)
    if out is not None and out.exists():
        raise UsageError(f"--out {out} exists: give another name, or remove it first")
    return out or run / name


def _write(path: Path, content: bytes) -> None:
    from vaelab.checkpoint import write_bytes

    write_bytes(path, content)
    print(path)
