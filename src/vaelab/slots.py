"""The slots of a run, and what may fill each: vaelab's own parts, and those that somebody has registered.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from vaelab import objectives, specs
from vaelab.errors import UsageError, did_you_mean

Encoder = specs.MLPEncoder | specs.ConvEncoder | specs.ResidualEncoder
Decoder = specs.MLPDecoder | specs.ConvDecoder | specs.ResidualDecoder
Posterior = (
    specs.DiagonalNormal | specs.FullNormal | specs.PlanarFlow | specs.RadialFlow | specs.IAF | specs.VonMisesFisher
    | specs.VectorQuantized | specs.GumbelSoftmax | specs.Deterministic
)  # fmt: skip
Prior = (
    specs.StandardNormal | specs.Mixture | specs.VampPrior | specs.FlowPrior | specs.UniformSphere
    | specs.UniformCodes | specs.UniformCategories | specs.TwoStage
)  # fmt: skip
Likelihood = (
    specs.Bernoulli | specs.ContinuousBernoulli | specs.Gaussian | specs.OptimalGaussian | specs.PixelGaussian
    | specs.Laplace | specs.DiscretizedLogistic | specs.LogisticMixture | specs.Categorical256
)  # fmt: skip
Objective = (
    objectives.ELBO | objectives.Capacity | objectives.FreeBits | objectives.BalancedELBO | objectives.IWAE
    | objectives.PIWAE | objectives.DReG | objectives.STL | objectives.BetaTC | objectives.Factor | objectives.DIP
    | objectives.MMD | objectives.AAE | objectives.VAEGAN | objectives.WakeSleep | objectives.RAE
)  # fmt: skip
Optimizer = specs.Adam | specs.AdamW
LearningRate = specs.Constant | specs.Plateau | specs.WarmupCosine | specs.Cyclic

_OURS: dict[str, Any] = {
    "encoder": Encoder, "posterior": Posterior, "prior": Prior, "decoder": Decoder, "likelihood": Likelihood,
    "objective": Objective, "optimizer": Optimizer, "schedule": LearningRate,
}  # fmt: skip
_MADE_BY = {"objective": "loss", "optimizer": "build", "schedule": "schedule"}  # the method of a slot that is no part's
_added: dict[str, dict[str, type]] = {slot: {} for slot in _OURS}  # what was registered, by the name in a run folder

SLOTS = tuple(_OURS)
"""Slots that may hold several kinds of spec, and so have a flag that chooses."""

MEASURED = tuple(slot for slot in SLOTS if slot not in ("optimizer", "schedule"))
"""Those that make another model or objective, for which what bf16 changes was not measured."""

PARTS = "VAELAB_PARTS"
"""The environment variable that names files or modules which register parts, as ``--parts`` does."""

KindT = TypeVar("KindT", bound=type)


def kinds(slot: str) -> tuple[type, ...]:
    """The specs that a slot may hold: vaelab's, then those that were registered."""
    return (*typing.get_args(_OURS[slot]), *_added[slot].values())


def kinds_by_word(slot: str) -> dict[str, type]:
    """The words by which the specs of a slot are chosen: ``warmup-cosine`` for ``WarmupCosine``."""
    return {kind.word: kind for kind in kinds(slot)}


def name_of(kind: type) -> str:
    """What a run folder calls a kind of spec: ``Bernoulli``; ``module:Class`` where it was registered."""
    full = f"{kind.__module__}:{kind.__qualname__}"
    return full if any(added.get(full) is kind for added in _added.values()) else kind.__name__


def registered_as(name: str, kinds: Iterable[type]) -> type | None:
    """The one of these kinds that a run folder calls ``module:Class``.

    A class of a script or notebook is of the module ``__main__`` there, and of the file's where it is imported: then
    the class's name decides.
    """
    module, _, own = name.partition(":")
    for kind in kinds:
        theirs = name_of(kind).partition(":")
        if own and theirs[2] == own and (theirs[0] == module or "__main__" in (theirs[0], module)):
            return kind
    return None


def unregistered(name: str) -> str:
    """What to do about a kind ``module:Class`` that is not registered."""
    module = name.partition(":")[0]
    file = "FILE" if module == "__main__" else f"{module.split('.')[-1]}.py"
    remedy = f"on the command line: vaelab --parts {file} COMMAND ...; in Python: import its module first"
    return f"{name}, which is not vaelab's and was not registered here; {remedy}"


def parts_of(run: Any) -> list[str]:
    """The flags of the command line by which the registered parts of a run become known: ``--parts FILE`` for each."""
    modules = [name_of(type(getattr(run, slot))).rpartition(":")[0] for slot in SLOTS]
    return [word for module in dict.fromkeys(filter(None, modules)) for word in ("--parts", _source_of(module))]


def _source_of(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    return module if file is None or "." in module else os.path.relpath(file)


# --- parts of one's own ---------------------------------------------------------------------------------------------


def register(slot: str) -> Callable[[KindT], KindT]:
    """Let specs or objectives from outside vaelab fill a slot, as a class decorator.

    From then on they are what vaelab's own are: words and flags of the command line, settings of ``override``, and
    runs that hold them are written to run folders and read back, in every program that registers them first:
    ``import`` their module in Python, or name it to the command line, ``vaelab --parts FILE COMMAND ...``. Nothing is
    imported because a run folder says so. The same class may be registered anew, as when a cell is run again.

    Args:
        slot: encoder, posterior, prior, decoder, likelihood, objective, optimizer or schedule.

    Raises:
        UsageError: if the class cannot fill the slot, naming what it lacks.

    Example::

        @vaelab.register("objective")
        @dataclass(frozen=True)
        class SquaredRate(vaelab.ELBO):
            word = "squared-rate"
            scale: float = vaelab.specs.positive(10.0, "nats at which the square is the rate itself")

            def loss(self, means):
                return means["distortion"] + means["rate"] ** 2 / self.scale
    """
    if slot not in _OURS:
        raise UsageError(f"a run has no slot {slot!r}{did_you_mean(slot, _OURS)}")

    def add(kind: KindT) -> KindT:
        name = f"{kind.__module__}:{kind.__qualname__}"
        _require_spec(slot, kind, name)
        _added[slot][name] = kind
        return kind

    return add


def _require_spec(slot: str, kind: type, name: str) -> None:
    """Refuse a class that a run could not hold in this slot."""
    what = f"{kind.__qualname__} cannot be registered as {slot}"
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError(f"{what}: make it a frozen dataclass")
    base = objectives.Objective if slot == "objective" else specs.Spec if slot not in _MADE_BY else object
    if not issubclass(kind, base):
        raise UsageError(f"{what}: make it a subclass of vaelab.{base.__module__.split('.')[1]}.{base.__name__}")
    if inspect.isabstract(kind):
        raise UsageError(f"{what}: it has abstract methods left")
    method = _MADE_BY.get(slot, "build")
    if not callable(getattr(kind, method, None)):
        raise UsageError(f"{what}: it has no method {method}(...)")
    if issubclass(kind, specs.Spec) and kind.build is specs.Spec.build and kind.part == name:
        raise UsageError(f'{what}: name the module that it makes (part = f"{{__name__}}:CLASS")')
    word = vars(kind).get("word")
    if not isinstance(word, str):
        raise UsageError(f'{what}: give it a word of its own to be chosen by (word = "ring")')
    if (taken := kinds_by_word(slot).get(word)) is not None and f"{taken.__module__}:{taken.__qualname__}" != name:
        raise UsageError(f"{what}: the word {word!r} is that of {taken.__qualname__}")
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
            raise UsageError(f"{what}: declare {field.name} by vaelab.specs.option(default, help)")
        names = (field.name, field.metadata["flag"], *field.metadata["aliases"])
        if clash := sorted(set(names) & {*SLOTS, "out", "resume", "help", "parts"}):
            raise UsageError(f"{what}: the name {clash[0]!r} is taken on the command line")


def import_parts(names: list[str]) -> None:
    """Import files or modules that register parts, once each; those of ``$VAELAB_PARTS`` first.

    Processes that this one starts do the same. A file is a module of its stem's name, wherever it lies.

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
        except Exception as error:
            # The line of the file, and not of what it calls, tells what to mend.
            frames = traceback.extract_tb(error.__traceback__)
            lines = [getattr(error, "lineno", None), *(frame.lineno for frame in frames if frame.filename == name)]
            at = "".join(f", line {line}" for line in lines[-1:] if line)
            kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
            raise UsageError(f"--parts {name}{at}: {kind}{error}") from error


def _import(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    stem = Path(name).stem
    if not Path(name).is_file():
        raise UsageError("there is no such file")
    if stem in sys.modules:
        if getattr(sys.modules[stem], "__file__", None) != name:
            raise UsageError(f"another module is called {stem}: rename the file")
        return
    found = spec_from_file_location(stem, name)
    assert found is not None
    assert found.loader is not None, "a file that ends in .py has one"
    sys.modules[stem] = module_from_spec(found)
    try:
        found.loader.exec_module(sys.modules[stem])
    except BaseException:
        del sys.modules[stem]
        raise
