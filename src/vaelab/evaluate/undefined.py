"""What cannot be had of a model, and why: asked before hours are spent on it, and told in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from vaelab.errors import UsageError
from vaelab.evaluate.estimate import Estimate, evaluating
from vaelab.models import SPACES, VAE
from vaelab.runtime import RowNoise


def why_no_bound(model: VAE) -> str | None:
    """Why more samples give no better bound on log p(x); None where they do."""
    with evaluating(model):
        draw = model.draw(torch.zeros(1, *model.shape, device=model.device), noise=RowNoise(0, device=model.device))
        try:
            _ = draw.log_w
        except TypeError as error:
            return str(error)
    return "its code is chosen, not drawn: the ELBO is all that can be had" if model.space == "codes" else None


def why_no_annealing(model: VAE, start: Literal["encoder", "prior"] = "encoder") -> str | None:
    """Why chains cannot be led from q(z|x), or from p(z), to p(z|x); None where they can."""
    if model.space != "real":
        return f"annealing moves through real vectors, and the latents of this model lie in {SPACES[model.space]}"
    if start == "prior":  # such chains never ask q(z|x)
        return _why_no_prior_density(model)
    return why_no_bound(model) or why_no_density(model)


def _why_no_prior_density(model: VAE) -> str | None:
    with evaluating(model):
        try:
            model.prior().log_prob(torch.zeros(1, model.latent_dim, device=model.device))
        except TypeError as error:
            return str(error)
    return None


def why_no_density(model: VAE) -> str | None:
    """Why q(z|x) cannot score latents that it did not draw itself; None where it can."""
    with evaluating(model):
        qz = model.posterior(torch.zeros(1, *model.shape, device=model.device))
        try:
            qz.log_prob(torch.zeros(1, model.latent_dim, device=model.device))
        except NotImplementedError as error:
            return f"{error} (chains can start from the prior: --ais-start prior)"
    return None


def as_defined(measures: Mapping[str, Callable[[], dict[str, Estimate]]]) -> tuple[dict[str, Estimate], list[str]]:
    """All that can be measured, and why the rest cannot: a sentence for each reason.

    Args:
        measures: by the words for them in such a sentence; one that is undefined raises a ``TypeError``, one that has
            too little to go by a ``UsageError``.
    """
    found: dict[str, Estimate] = {}
    reasons: dict[str, list[str]] = {}
    for name, measure in measures.items():
        try:
            found |= measure()
        except (TypeError, UsageError) as error:
            reasons.setdefault(str(error), []).append(name)
    return found, [f"No {', '.join(names)}: {reason}." for reason, names in reasons.items()]
