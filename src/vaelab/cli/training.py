"""``vaelab recipes`` and ``vaelab train``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vaelab.cli.common import parse, refuse_repeated_lists, refuse_unknown_flags, without_none
from vaelab.config import Run, flat, override
from vaelab.errors import InterruptedRun, UsageError
from vaelab.labels import cost, duration
from vaelab.recipes import RECIPES, recipe
from vaelab.slots import SLOTS, kinds_by_word, parts_of, recipes_added

log = logging.getLogger("vaelab")

Tracked = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def recipes() -> None:
    """List the recipes: what each reproduces, its published numbers, its cost."""
    table = Table.grid(padding=(0, 2))
    for name, entry in RECIPES.items():
        published = ", ".join(f"{key} {value:.2f}" for key, value in entry.published.items())
        facts = [f"source {entry.source}"]
        if entry.minutes is not None:
            facts.append(f"{duration(60 * entry.minutes)} of processor time")
        on = "" if name in recipes_added else " (MNIST test)"
        facts += [f"published{on}: {published}" if published else "no comparable number is published"]
        table.add_row(f"[bold]{name}", escape(entry.title))
        table.add_row("", f"[dim]{escape('; '.join(facts))}")
    Console().print(table, highlight=False)


def train() -> None:
    """Train a recipe: vaelab train RECIPE [--data mnist|digits|PATH|...] [--out DIR] [--resume] [any setting]."""


def run_training(arguments: list[str], others: int = 0) -> None:
    """``vaelab train`` with these arguments: its flags depend on the recipe, so it parses them itself.

    Args:
        arguments: the command line.
        others: how many other programs compute on this machine.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        Console().print(f"usage: vaelab train RECIPE ...\n\n{train.__doc__}\n", highlight=False, markup=False)
        recipes()
        Console().print("\nvaelab train RECIPE --help lists a recipe's settings.", highlight=False)
        return
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-"):
        raise UsageError(f"the recipe comes first: vaelab train RECIPE {name} ...; choose one of {', '.join(RECIPES)}")
    base = recipe(name)
    if _value(rest, "--out") == "":
        raise UsageError("--out is empty: name a folder, or leave it out")
    if "--resume" in rest:
        # Parsed with the folder's own settings as defaults: what is not given on the command line is the folder's, and
        # what is given and differs is found.
        from vaelab.runs.folder import RunFolder

        folder = _folder_asked_for(base, rest)
        base = RunFolder.open(folder).run
        if base.recipe != name:
            raise UsageError(f"{folder} holds a run of {base.recipe}, not of {name}")
    run, out, resume, track = _parse(_choose_parts(base, rest), rest)
    _fit(run, out or _default_folder(run.recipe, run.data.source, run.training.seed), resume, track, others)


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


def _fit(run: Run, folder: Path, resume: bool, track: Sequence[str], others: int) -> None:
    from vaelab.data.datasets import load
    from vaelab.drawing import pictures
    from vaelab.processes.distributed import launched, leads
    from vaelab.progress import Display
    from vaelab.runs.folder import RunFolder
    from vaelab.trackers import TRACKERS
    from vaelab.train import fit, with_absolute_path

    trackers = [TRACKERS[word]() for word in dict.fromkeys(track)]
    if not leads():
        logging.getLogger("vaelab").setLevel(logging.WARNING)
    run = with_absolute_path(run)
    if resume:
        run = RunFolder.open(folder).reconcile(run)
        RunFolder.open(folder).require_path_of_data(run)
    elif leads():
        RunFolder.create(folder)  # refuses a folder that is taken before any data are loaded
    data = load(run.data)
    say = log.info
    if others and run.training.threads is None:
        few = max(1, (os.cpu_count() or 1) - others)
        say("other programs compute on this machine: --threads %d may well be faster", few)
    say("%s on %s: %d/%d/%d images for training/validation/test, into %s", run.recipe, data.name,
        len(data.train), len(data.validation), len(data.test), folder)  # fmt: skip
    each_epoch = [pictures.draw_each_epoch, *trackers]
    with contextlib.ExitStack() as until_drawn:
        for tracker in trackers:
            until_drawn.enter_context(tracker)
        try:
            model = fit(run, data, out=folder, resume=resume, on_epoch_end=each_epoch, display=Display())
        except InterruptedRun as error:
            again = [*parts_of(run), "train", run.recipe, "--out", str(folder), "--resume"]
            again += ["--track", *track] if track else []
            raise InterruptedRun(f"{error}; go on with: {launched(again)}") from error
        if not leads():
            return
        kept = RunFolder.open(folder)
        best_epoch, history = kept.best_epoch(), kept.history()
        pictures.draw_at_end(run, model, data, history, best_epoch, folder)
        for tracker in trackers:
            tracker.show([p for p in run.pictures if p.every is None], folder, best_epoch)
    say("epoch %d, validation: %s per image", history[-1]["epoch"], cost(history[-1], " + "))
    say("done; test numbers: vaelab evaluate %s", shlex.quote(str(folder)))


def _choose_parts(run: Run, arguments: Sequence[str]) -> Run:
    """Apply the flags that choose a part (``--optimizer adamw``): they decide which other flags there are."""
    chosen: dict[str, str] = {}
    for slot in SLOTS:
        if (word := _value(arguments, f"--{slot}")) is not None:
            chosen[slot] = word
    current = {slot: getattr(run, slot).word for slot in chosen if getattr(run, slot) is not None}
    return override(run, **{slot: word for slot, word in chosen.items() if current.get(slot) != word})


def _refuse_flags_of_other_parts(run: Run, arguments: Sequence[str], known: set[str]) -> None:
    """Raise for a setting that only parts have which were not chosen, naming them."""
    for flag in (argument.partition("=")[0] for argument in arguments):
        if not flag.startswith("--") or flag in known:
            continue
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        owners = [
            (slot, spec)
            for slot in SLOTS
            for spec in kinds_by_word(slot).values()
            for setting in dataclasses.fields(spec)
            if name in (setting.metadata["flag"], setting.name, *setting.metadata["aliases"])
        ]
        # The setting of a part that was chosen is known by another name, beside others of the same: that is suggested.
        if owners and not any(isinstance(getattr(run, slot), spec) for slot, spec in owners):
            words = ", ".join(f"--{slot} {cast(Any, spec).word}" for slot, spec in owners)
            raise UsageError(f"{flag} is a setting of {words}, and none of these is chosen: leave it out")


def _parse(run: Run, arguments: Sequence[str]) -> tuple[Run, Path | None, bool, tuple[str, ...]]:
    """Parse a recipe's flags, which are the run's own settings by their flat names."""
    leaves = flat(run)
    fields: list[Any] = []
    known = {"--out", "--resume", "--no-resume", "--track", "--help", *(f"--{slot}" for slot in SLOTS)}
    for name, leaf in leaves.items():
        flag, *aliases = words = [word.replace("_", "-") for word in (name, *leaf.aliases)]
        argument = tyro.conf.arg(name=flag, help=leaf.help, aliases=[f"--{alias}" for alias in aliases])
        fields.append((name, Annotated[leaf.type, argument], leaf.value))
        known |= {f"--{prefix}{word}" for word in words for prefix in (("", "no-") if leaf.type is bool else ("",))}
    for slot in SLOTS:
        kinds: Any = Literal[tuple(kinds_by_word(slot))]  # pyright: ignore[reportInvalidTypeForm]
        help, part = f"kind of {slot.replace('_', ' ')}", getattr(run, slot)
        if part is None:
            kinds, help = kinds | None, f"{help} (default: by the data's channels)"
        fields.append((f"{slot}_kind", Annotated[kinds, tyro.conf.arg(name=slot, help=help)], part and part.word))
    fields += [
        ("out", Annotated[Path | None, tyro.conf.arg(help="run folder; default: runs/RECIPE-DATA-sSEED")], None),
        ("resume", Annotated[bool, tyro.conf.arg(help="go on with the run in that folder")], False),
        ("track", Annotated[tuple[Tracked, ...], tyro.conf.arg(help="record the run there too")], ()),
    ]
    fields = [(name, without_none(kind, value), dataclasses.field(default=value)) for name, kind, value in fields]
    _refuse_flags_of_other_parts(run, arguments, known)
    refuse_unknown_flags(arguments, known)
    lists = {f"--{name.replace('_', '-')}": leaf.type for name, leaf in leaves.items()}
    refuse_repeated_lists(arguments, {**lists, "--track": tuple[str, ...]})
    flags = dataclasses.make_dataclass("Flags", fields)
    entry = RECIPES[run.recipe]
    description = f"{entry.title} (source: {entry.source})"
    parsed = parse(flags, arguments, f"vaelab train {run.recipe}", description=description)
    changes = {name: getattr(parsed, name) for name, leaf in leaves.items() if getattr(parsed, name) != leaf.value}
    return override(run, **changes), parsed.out, parsed.resume, parsed.track
