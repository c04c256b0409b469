"""Recipes: the configurations that vaelab reproduces, as functions that return a ``Run``. Imports no torch.

Each names its source and what the source publishes. A recipe is started with ``vaelab train NAME``; in Python it is a
function of this module (``recipes.conv_beta()``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vaelab.config import flat, override
from vaelab.errors import UsageError, did_you_mean
from vaelab.recipes import kingma_welling, likelihoods, structures, systems
from vaelab.recipes.recipe import Recipe as Recipe
from vaelab.recipes.recipe import part_of as part_of
from vaelab.slots import SLOTS

if TYPE_CHECKING:
    from vaelab.config import Run

RECIPES: dict[str, Recipe] = {**systems.RECIPES, **kingma_welling.RECIPES, **likelihoods.RECIPES, **structures.RECIPES}
"""All recipes by their names: vaelab's, then those that were registered."""


def recipe(name: str) -> Run:
    """The run of the recipe of this name.

    Raises:
        UsageError: if there is none.
    """
    if name not in RECIPES:
        own = "one of your own is known by vaelab --parts FILE ..."
        raise UsageError(f"no recipe {name!r}{did_you_mean(name, RECIPES)} ({own})")
    return RECIPES[name].make()


def flags_of(run: Run) -> list[str]:
    """The flags of ``vaelab train`` that make the recipe's run this one.

    Example:
        >>> flags_of(override(recipe("mlp"), beta=0.5, clip_norm=1.0))
        ['--beta', '0.5', '--clip-norm', '1.0']
    """
    base, words = recipe(run.recipe), list[str]()
    for slot in SLOTS:
        part = getattr(run, slot)
        if part is not None and type(part) is not type(getattr(base, slot)):
            words += [f"--{slot}", part.word]
            base = override(base, **{slot: part.word})
    before = flat(base)
    for name, leaf in flat(run).items():
        flag, value = name.replace("_", "-"), leaf.value
        if value == before[name].value:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def __getattr__(name: str) -> Callable[[], Run]:
    if (entry := RECIPES.get(name.replace("_", "-"))) is not None:
        return entry.make
    raise AttributeError(f"module 'vaelab.recipes' has no attribute {name!r}")
