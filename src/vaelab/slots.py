"""The slots of a run, and what may fill each: vaelab's own parts, and those that somebody has registered.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import shlex
import sys
import typing
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, cast

from vaelab import objectives, specs

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
    | objectives.MMD | objectives.AAE | objectives.VAEGAN | objectives.WakeSleep | objectives.MCEM
    | objectives.RAE
)  # fmt: skip
Optimizer = specs.Adam | specs.AdamW | specs.Adagrad
LearningRate = specs.Constant | specs.Plateau | specs.WarmupCosine | specs.Cyclic

_OURS: dict[str, Any] = {
    "encoder": Encoder, "posterior": Posterior, "prior": Prior, "decoder": Decoder, "likelihood": Likelihood,
    "objective": Objective, "optimizer": Optimizer, "schedule": LearningRate,
}  # fmt: skip
SLOTS = tuple(_OURS)
"""Slots that may hold several kinds of spec, and so have a flag that chooses."""

MEASURED = tuple(slot for slot in SLOTS if slot not in ("optimizer", "schedule"))
"""Those that make another model or objective, for which what bf16 changes was not measured."""

_added: dict[str, dict[str, type]] = {slot: {} for slot in SLOTS}  # what was registered, by its name in a run folder
_names: dict[type, str] = {}  # those names, and of classes in whose place others were registered
recipes_added: dict[str, Callable[[], Any]] = {}
"""The functions of recipes that were registered, by the recipe's name."""


def kinds(slot: str) -> tuple[type, ...]:
    """The specs that a slot may hold: vaelab's, then those that were registered."""
    return (*typing.get_args(_OURS[slot]), *_added[slot].values())


def kinds_by_word(slot: str) -> dict[str, Any]:
    """The specs of a slot by the words that choose them: ``warmup-cosine`` for ``WarmupCosine``."""
    return {cast(Any, kind).word: kind for kind in kinds(slot)}


def name_of(kind: type) -> str:
    """What a run folder calls a kind of spec: ``Bernoulli``; ``module:Class`` where it was registered."""
    return _names.get(kind, kind.__name__)


def named(name: str, kinds: Iterable[type]) -> type | None:
    """The one of these kinds that a run folder calls so.

    A class of a notebook has no module but ``__main__``. Moved to a file it is found by its own name, if no other
    class has that.
    """
    known = {name_of(kind): kind for kind in kinds}
    if name in known or not name.startswith("__main__:"):
        return known.get(name)
    same = [kind for other, kind in known.items() if other.partition(":")[2] == name.partition(":")[2]]
    return same[0] if len(same) == 1 else None


def unregistered(name: str) -> str:
    """What to do about a kind ``module:Class`` that is not registered."""
    module = name.partition(":")[0]
    file = "FILE" if module == "__main__" else module if "." in module else f"{module}.py"
    remedy = f"on the command line: vaelab --parts {shlex.quote(file)} COMMAND ...; in Python: import its module first"
    return f"{name}, which is not vaelab's and was not registered here; {remedy}"


@contextmanager
def holding(slot: str, name: str, kind: type) -> Generator[None]:
    """Let a slot hold this kind too, from the end of the block on: inside it is tried, and an error undoes it."""
    before = _added[slot].get(name)
    _added[slot][name], _names[kind] = kind, name
    try:
        yield
    except BaseException:
        del _added[slot][name], _names[kind]
        if before is not None:
            _added[slot][name] = before
        raise


def count_of_registered() -> int:
    """How many kinds and recipes were registered."""
    return sum(map(len, (*_added.values(), recipes_added)))


def sources_of(run: Any) -> list[str]:
    """Files, or modules of packages, that register parts of a run or its recipe."""
    own: list[Any] = [kind for slot in SLOTS if (kind := type(getattr(run, slot))) in _names]
    own += filter(None, [recipes_added.get(run.recipe)])
    return list(dict.fromkeys(filter(None, map(_file_of, own))))


def parts_of(run: Any, *, whole: bool = True) -> list[str]:
    """The flags of the command line by which the registered parts of a run, and its recipe, become known.

    Args:
        run: a ``Run``.
        whole: with the way to each file; else its name alone, as in what others are to read.
    """
    return [word for file in sources_of(run) for word in ("--parts", file if whole else PurePath(file).name)]


def _file_of(added: Any) -> str | None:
    file = getattr(sys.modules.get(added.__module__), "__file__", None)  # a notebook has none
    return added.__module__ if "." in added.__module__ else file and os.path.relpath(file)
