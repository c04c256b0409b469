"""A trial of parts that are not vaelab's, before training: what tests hold vaelab's own parts to.

Shapes: K samples, B images, D latent dimensions, P parameters a channel.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.config import Run
from vaelab.errors import UsageError
from vaelab.likelihoods.likelihood import Support
from vaelab.models import VAE, Batch
from vaelab.objectives import Objective
from vaelab.runtime import RowNoise, eval_mode, seeded
from vaelab.slots import SLOTS

B, K = 2, 3


def require_contract(run: Run, model: VAE, networks: nn.ModuleDict) -> None:
    """Hold the parts of a run to what a VAE and its training need of them, on two black images.

    A run whose parts are all vaelab's is not looked at. What the parts themselves raise is not caught: that is for
    whoever writes them.

    Raises:
        UsageError: naming the slot, what it gave and what it should give.
    """
    foreign = [slot for slot in SLOTS if not type(getattr(run, slot)).__module__.startswith(("vaelab.", "builtins"))]
    if not foreign:
        return
    # The seed: torch's distributions draw from the global generator.
    with eval_mode(model, networks), seeded(0, model.device):
        with torch.no_grad():
            _require_parts(run, model)
        if "objective" in foreign:
            _require_objective(run.objective, model, networks)


def _require_parts(run: Run, model: VAE) -> None:
    x, noise = torch.zeros(B, *model.shape, device=model.device), RowNoise(0, device=model.device)
    features = model.encoder(x)
    _require_shape(run, "encoder", "its features", features, (B, model.encoder.out_features))
    qz = model.posterior_head(features)
    _require_names(run, "posterior", qz, ("rsample_and_log_prob", "center", "penalty"))
    z, log_density = qz.rsample_and_log_prob((K,), noise, stop=False)
    _require_shape(run, "posterior", "a sample", z, (K, B, model.latent_dim))
    _require_shape(run, "posterior", "its center", qz.center, (B, model.latent_dim))
    if qz.penalty is not None:
        _require_shape(run, "posterior", "its penalty", qz.penalty, (B,))
    if log_density is not None:
        if not callable(log_density):
            _refuse(run, "posterior", "the log-density of a sample is to be a function that computes it, or None")
        _require_shape(run, "posterior", "the log-density of a sample", log_density(), (K, B))
    pz = model.prior()
    _require_names(run, "prior", pz, ("log_prob", "sample"))
    _require_shape(run, "prior", "a sample", pz.sample((K,)), (K, model.latent_dim))
    head = model.likelihood_head
    if getattr(head, "support", None) not in typing.get_args(Support):
        _refuse(run, "likelihood", f"its support is to be one of {', '.join(typing.get_args(Support))}")
    channels, *sides = model.shape
    _require_shape(run, "decoder", "what it gives", model.decoder(z[0]),
                   (B, head.params_per_channel * channels, *sides))  # fmt: skip
    px = model.likelihood(z)
    _require_shape(run, "likelihood", "log_prob of images", px.log_prob(x), (K, B))
    try:
        mean = px.mean
    except NotImplementedError:
        _refuse(run, "likelihood", "its distribution has no mean, which every picture is made of")
    _require_shape(run, "likelihood", "its mean", mean, (K, B, *model.shape))


def _require_objective(objective: Objective, model: VAE, networks: nn.ModuleDict) -> None:
    batch, noise = Batch(torch.zeros(B, *model.shape, device=model.device)), RowNoise(0, device=model.device)
    now, what = objective.at(0.0), f"--objective {objective.word}"
    if not isinstance(now, Objective):
        raise UsageError(f"{what}: at(epoch) is to return the objective with its weights of that epoch")
    if not isinstance(now.annealing_epochs, int | float):
        raise UsageError(f"{what}: annealing_epochs is to be a number: a property")
    parts = now.parts(model, networks, batch, noise)
    if not isinstance(parts, Mapping):
        raise UsageError(f"{what}: parts is to return a dictionary of what each image has")
    for name, part in parts.items():
        if tuple(part.shape[:1]) != (B,):
            raise UsageError(f"{what}: the part {name!r} is to have a row for each image, not the shape "
                             f"{tuple(part.shape)}")  # fmt: skip
    if lost := [name for name in now.terms if name not in parts]:
        raise UsageError(f"{what}: the term {lost[0]!r} is none of its parts ({', '.join(parts)})")
    if "loss" in parts:
        raise UsageError(f"{what}: a part may not be called loss, which is what becomes of them")
    groups = now.groups(model, networks)
    given, losses = next(now.losses(model, networks, batch, noise))
    for group, loss in zip((given,) if isinstance(given, str) else given,
                           losses if isinstance(losses, Sequence) else (losses,), strict=True):  # fmt: skip
        if group not in groups:
            raise UsageError(f"{what}: it trains {group!r}, and its groups are {', '.join(groups)}")
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            raise UsageError(f"{what}: its loss for {group!r} is to be one number that depends on what is learned, "
                             f"not {_said(loss)}")  # fmt: skip


def _require_names(run: Run, slot: str, made: object, names: Sequence[str]) -> None:
    if missing := [name for name in names if not hasattr(made, name)]:
        _refuse(run, slot, f"its distribution has no {', '.join(missing)}")


def _require_shape(run: Run, slot: str, what: str, given: Any, wanted: tuple[int, ...]) -> None:
    if not isinstance(given, Tensor) or tuple(given.shape) != wanted:
        _refuse(run, slot, f"{what} should have the shape {wanted} for {B} images, not {_said(given)}")


def _refuse(run: Run, slot: str, why: str) -> typing.NoReturn:
    raise UsageError(f"--{slot} {getattr(getattr(run, slot), 'word', 'auto')}: {why}")


def _said(given: object) -> str:
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{tuple(given.shape)}" if given.dim() else "one number without a gradient"
