"""vaelab trains, measures, explains and ships variational autoencoders.

The public names below are loaded on first use, so that ``import vaelab`` and ``vaelab --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vaelab import data as data
    from vaelab import evaluate as evaluate
    from vaelab import figures as figures
    from vaelab import recipes as recipes
    from vaelab import specs as specs
    from vaelab import trackers as trackers
    from vaelab import train as train
    from vaelab.config import Run as Run
    from vaelab.config import override as override
    from vaelab.data import load as load
    from vaelab.errors import FailureError as FailureError
    from vaelab.errors import UsageError as UsageError
    from vaelab.estimator import Estimator as Estimator
    from vaelab.models import VAE as VAE
    from vaelab.objectives import ELBO as ELBO
    from vaelab.own import register as register
    from vaelab.runs.loading import load_model as load_model
    from vaelab.train import fit as fit

_NAMES = {  # the module of each; all others are modules themselves
    "Run": "config",
    "override": "config",
    "load": "data",
    "FailureError": "errors",
    "UsageError": "errors",
    "Estimator": "estimator",
    "VAE": "models",
    "ELBO": "objectives",
    "fit": "train",
    "load_model": "runs.loading",
    "register": "own",
}

__all__ = [  # noqa: RUF022
    "data", "evaluate", "figures", "recipes", "specs", "trackers", "train",
    "ELBO", "Estimator", "FailureError", "Run", "UsageError", "VAE", "fit", "load", "load_model", "override",
    "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vaelab' has no attribute {name!r}")
    if name in _NAMES:
        return getattr(import_module(f"vaelab.{_NAMES[name]}"), name)
    return import_module(f"vaelab.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
