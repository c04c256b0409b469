"""What a recipe is. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vaelab.config import Picture, Run

PICTURES = (
    Picture("samples", "samples.png"),
    Picture("reconstructions", "reconstructions.png"),
    Picture("loss_curve", "loss_curve.png"),
)
"""What most recipes draw when they have ended."""


@dataclass(frozen=True)
class Recipe:
    """A named configuration and what is known about it.

    Args:
        make: returns the run.
        title: one line that says what it is.
        source: the description that it implements.
        published: the source's numbers on MNIST's test set, by the metric's name (nats per image, or units); empty if
            it gives none for the same data and protocol.
        minutes: what full length takes on one CPU core, as measured.
        shown: what ``reproduce`` measures where nothing is published.
    """

    make: Callable[[], Run]
    title: str
    source: str
    published: dict[str, float]
    minutes: float
    shown: tuple[str, ...] = ("negative_elbo", "distortion", "rate")
