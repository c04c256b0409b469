"""Figures: pure functions of a model and arrays, which return a matplotlib figure or frames and write nothing.

Drawn inside ``with theme("dark"):`` they are for a dark page.
"""

from vaelab.figures.curves import comparison, loss_curve, training_history
from vaelab.figures.decoding import Way, between, decode, encode, sample_prior, traverse, walk
from vaelab.figures.images import (
    arithmetic,
    interpolation,
    manifold,
    manifold_images,
    neighbours,
    reconstructions,
    samples,
    traversals,
)
from vaelab.figures.latents import kl_bars, latent_map
from vaelab.figures.planes import importance_weights, rate_distortion
from vaelab.figures.projections import How, Projection, project
from vaelab.figures.style import COLOURS, STYLE, Theme, padded, picture, plain, theme, tile
from vaelab.figures.tuning import tuning

__all__ = [
    "COLOURS", "STYLE", "How", "Projection", "Theme", "Way", "arithmetic", "between", "comparison", "decode", "encode",
    "importance_weights", "interpolation", "kl_bars", "latent_map", "loss_curve", "manifold", "manifold_images",
    "neighbours", "padded", "picture", "plain", "project", "rate_distortion", "reconstructions", "sample_prior",
    "samples", "theme", "tile", "training_history", "traversals", "traverse", "tuning", "walk",
]  # fmt: skip
