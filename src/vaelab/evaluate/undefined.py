"""What cannot be had of a model, and why: asked before hours are spent on it, and told in one line."""

from __future__ import annotations

import torch

from vaelab.models import VAE
from vaelab.runtime import RowNoise


def why_no_bound(model: VAE) -> str | None:
    """Why more samples give no better bound on log p(x); None where they do."""
    device = next(model.parameters()).device
    with torch.no_grad():
        draw = model.draw(torch.zeros(1, *model.shape, device=device), noise=RowNoise(0, device=device))
        try:
            _ = draw.log_w
        except TypeError as error:
            return str(error)
    return "its code is chosen, not drawn: the ELBO is all that can be had" if model.space == "codes" else None


def why_no_annealing(model: VAE) -> str | None:
    """Why chains cannot be led from q(z|x) to p(z|x); None where they can."""
    if model.space != "real":
        return f"annealing moves through real vectors, and the latents of this model are {model.space}"
    return why_no_bound(model)
