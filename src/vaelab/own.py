"""Parts and recipes of one's own: registered, they are to every command what vaelab's are.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from vaelab import objectives, specs
from vaelab.config import Run, flat, from_json, to_json
from vaelab.errors import UsageError, did_you_mean
from vaelab.recipes import RECIPES, Recipe, part_of
from vaelab.slots import SLOTS, count_of_registered, holding, kinds_by_word, name_of, recipes_added

PARTS = "VAELAB_PARTS"
"""The environment variable that names files or modules which register parts, as ``--parts`` does."""

_NEEDS = {"objective": ("loss",), "optimizer": ("build",), "schedule": ("schedule", "warmup_epochs")}
_TAKEN = {"out", "resume", "track", "help", "parts", "kind", *SLOTS, *(f"{slot}_kind" for slot in SLOTS)}

AddedT = TypeVar("AddedT", bound=Callable[..., Any])


def register(
    slot: str, *, source: str | None = None, published: Mapping[str, float] | None = None
) -> Callable[[AddedT], AddedT]:
    """Let specs or objectives from outside vaelab fill a slot, or add a recipe: a decorator of a class or function.

    From then on they are what vaelab's own are: words and flags of the command line, settings of ``override``, and
    runs that hold them are written to run folders and read back, in every program that registers them first:
    ``import`` their module in Python, or name it to the command line, ``vaelab --parts FILE COMMAND ...``. Nothing is
    imported because a run folder says so. A class may be registered anew, as when a cell is run again.

    A recipe is a function without arguments that returns a ``Run``: its name is the function's, with hyphens, and its
    title the first line of the docstring.

    Args:
        slot: encoder, posterior, prior, decoder, likelihood, objective, optimizer or schedule; or recipe.
        source: of a recipe: what it implements; None: the file it is in.
        published: of a recipe: numbers of that source, which ``vaelab reproduce`` puts beside its own, by their names
            in ``metrics.json`` (``rate``, ``nll_5000``), in nats per image or units.

    Raises:
        UsageError: if the class cannot fill the slot, or the function is no recipe, naming what it lacks.

    Example::

        @vaelab.register("objective")
        @dataclass(frozen=True)
        class SquaredRate(vaelab.objectives.Objective):
            word = "squared-rate"
            scale: float = vaelab.specs.positive(10.0, "nats at which the square is the rate itself")

            def loss(self, means):
                return means["distortion"] + means["penalty"] + means["rate"] ** 2 / self.scale
    """
    if not isinstance(slot, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError("write @vaelab.register(SLOT), as @vaelab.register('prior')")
    if slot == "recipe":
        return functools.partial(_add_recipe, source=source, published=published or {})
    if slot not in SLOTS:
        raise UsageError(f"a run has no slot {slot!r}{did_you_mean(slot, (*SLOTS, 'recipe'))}")
    if source is not None or published is not None:
        raise UsageError(f"source and published are of a recipe, not of a kind of {slot}")

    def add(added: AddedT) -> AddedT:
        kind: Any = added
        if not isinstance(kind, type):
            raise UsageError(f"{kind} cannot be registered as {slot}: it is no class")
        name = f"{_module_of(kind)}:{kind.__qualname__}"
        what = f"{kind.__qualname__} cannot be registered as {slot}"
        if reason := _lack(slot, kind) or _clash(slot, kind, name):
            raise UsageError(f"{what}: {reason}")
        with holding(slot, name, kind):
            try:
                _try(slot, kind)
            except Exception as error:
                raise UsageError(f"{what}: {error}") from error
        return added

    return add


def _module_of(kind: type) -> str:
    """The module by which others import the class: of a script that is run, its file's name."""
    if kind.__module__ != "__main__":
        return kind.__module__
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:  # python -m module
        return spec.name
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else "__main__"


def _lack(slot: str, kind: type) -> str | None:
    """What a class lacks to be a spec of this slot."""
    if "__dataclass_params__" not in vars(kind) or not vars(kind)["__dataclass_params__"].frozen:
        return "make it a frozen dataclass"
    base = objectives.Objective if slot == "objective" else object if slot in _NEEDS else specs.Spec
    if not issubclass(kind, base):
        return f"make it a subclass of vaelab.{base.__module__.split('.')[1]}.{base.__name__}"
    missing = [name for name in _NEEDS.get(slot, ("build",)) if not hasattr(kind, name)]
    if missing or inspect.isabstract(kind):
        return f"it has no {', '.join(missing or sorted(vars(kind)['__abstractmethods__']))}"
    if issubclass(kind, specs.Spec) and kind.build is specs.Spec.build:
        itself = kind.part in (f"{kind.__module__}:{kind.__qualname__}", f"{kind.__module__}:{kind.__name__}")
        if itself or not re.fullmatch(r"[^:]+:\w+", kind.part):
            return 'name the module that it makes: part = f"{__name__}:CLASS"'
    if not re.fullmatch("[a-z0-9][a-z0-9-]*", str(vars(kind).get("word"))):
        return 'give it a word of its own to be chosen by, in small letters: word = "ring"'
    for field in dataclasses.fields(cast(Any, kind)):
        if not {"help", "flag", "aliases"} <= field.metadata.keys():
            return f"declare {field.name} by vaelab.specs.option(default, help)"
    return None


def _clash(slot: str, kind: type, name: str) -> str | None:
    """Which of its names is another's."""
    word = vars(kind)["word"]
    if (other := kinds_by_word(slot).get(word)) is not None and name_of(other) != name:
        return f"the word {word!r} is that of {other.__qualname__}"
    general = {word for name, leaf in flat(Run(recipe="trial")).items() if leaf.slot not in SLOTS
               for word in (name, *leaf.aliases)}  # fmt: skip
    for field in dataclasses.fields(cast(Any, kind)):
        for given in filter(None, (field.name, field.metadata["flag"], *field.metadata["aliases"])):
            if given in _TAKEN | general:
                return f"the name {given!r} is taken on the command line"
            if not given.isidentifier():
                return f"{given!r} is no name of a setting: letters, digits and _"
    return None


def _try(slot: str, kind: type) -> None:
    """Write a run that holds it, with its defaults, and read it back."""
    run = Run(recipe="trial", **{slot: kind()})
    _require_readable(run)
    flat(run)  # raises, if a name is another's


def _require_readable(run: Run) -> None:
    if from_json(json.loads(json.dumps(to_json(run)))) != run:
        raise UsageError("its settings are not the same when they are read back from JSON")


# --- recipes --------------------------------------------------------------------------------------------------------


def _add_recipe(function: AddedT, *, source: str | None, published: Mapping[str, float]) -> AddedT:
    """Add the recipe that a function makes; returns a function whose run has the recipe's name."""
    called, module = getattr(function, "__name__", str(function)), getattr(function, "__module__", "")
    name, what = called.replace("_", "-"), f"{called} cannot be registered as recipe"

    def same(other: Any) -> bool:
        return (other.__module__, other.__qualname__) == (module, function.__qualname__)

    if not inspect.isfunction(function) or inspect.signature(function).parameters:
        raise UsageError(f"{what}: make it a function without arguments")
    if not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise UsageError(f"{what}: give it a name in small letters")
    if name in RECIPES and not (name in recipes_added and same(recipes_added[name])):
        raise UsageError(f"{what}: another recipe is called {name}")
    if not (title := (inspect.getdoc(function) or "").partition("\n")[0].removesuffix(".")):
        raise UsageError(f"{what}: say in its docstring what it is")

    @functools.wraps(function)
    def make() -> Run:
        run = function()
        if not isinstance(run, Run):
            raise UsageError(f"it returns {type(run).__name__}, not a vaelab.Run")
        return dataclasses.replace(run, recipe=name)

    try:
        _require_readable(make())
        for number, value in dict(published).items():
            part_of(number)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UsageError(f"published {number} is {value!r}: give a number")
    except Exception as error:
        raise UsageError(f"{what}: {error}") from error
    file = sys.modules[module].__dict__.get("__file__") if module in sys.modules else None
    RECIPES[name] = Recipe(make, title, source or (Path(file).name if file else "a notebook"), dict(published), None)
    recipes_added[name] = make
    return cast(AddedT, make)


# --- files that register them ---------------------------------------------------------------------------------------


def import_parts(names: Iterable[str]) -> None:
    """Import files or modules that register parts, once each; those of ``$VAELAB_PARTS`` first.

    Processes that this one starts do the same. A file is a module of its stem's name, and finds what lies beside it.

    Raises:
        UsageError: naming one that cannot be imported, and why.
    """
    wanted = dict.fromkeys([*filter(None, os.environ.get(PARTS, "").split(os.pathsep)), *names])
    if not wanted:
        return
    found = [str(Path(name).resolve()) if name.endswith(".py") else name for name in wanted]
    os.environ[PARTS] = os.pathsep.join(dict.fromkeys(found))
    for name in found:
        try:
            _import(name)
        except (Exception, SystemExit) as error:
            # The line of the file, and not of what it calls, tells what to mend.
            frames = traceback.extract_tb(error.__traceback__)
            lines = [getattr(error, "lineno", None), *(frame.lineno for frame in frames if frame.filename == name)]
            at = "".join(f", line {line}" for line in lines[-1:] if line)
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                raise UsageError(f"--parts {name}: no file that ends in .py, and no module of this name") from error
            why = f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("UsageError: ")
            raise UsageError(f"--parts {name}{at}: {why}") from error
    if count_of_registered() == 0:
        raise UsageError(f"--parts {' '.join(found)}: nothing is registered there (@vaelab.register(SLOT))")


def _import(name: str) -> None:
    if not name.endswith(".py"):
        _search(Path.cwd())
        importlib.import_module(name)
        return
    file, stem = Path(name), Path(name).stem
    if not file.is_file():
        raise UsageError("there is no such file (a module is named without .py)")
    if "." in stem:
        raise UsageError("a module's name has no dot: rename the file")
    importlib.invalidate_caches()  # the file may be new
    found = sys.modules.get(stem) or importlib.util.find_spec(stem)
    if found is not None:
        other = getattr(found, "__file__", None) or getattr(found, "origin", None)
        if other is None or Path(other).resolve() != file:
            raise UsageError(f"another module is called {stem}: rename the file")
    _search(file.parent)
    importlib.import_module(stem)


def _search(folder: Path) -> None:
    """Look for modules in this folder too, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
