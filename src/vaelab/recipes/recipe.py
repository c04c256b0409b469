"""What a recipe is. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vaelab.config import Picture, Run
from vaelab.errors import UsageError, did_you_mean

PICTURES = (
    Picture("samples", "samples.png"),
    Picture("reconstructions", "reconstructions.png"),
    Picture("loss_curve", "loss_curve.png"),
)
"""What most recipes draw when they have ended."""

_NUMBERS = {
    "elbo": ("negative_elbo", "distortion", "rate", "objective", "bits_per_dim"),
    "latents": (
        "active_units", "perplexity", "mutual_information", "linear_probe", "knn_probe", "total_correlation",
        "mutual_information_gap",
    ),
    "reconstruction": ("mse", "psnr", "ssim"),
    "samples": ("frechet", "precision", "recall"),
}  # fmt: skip
_PART_OF = {number: part for part, numbers in _NUMBERS.items() for number in numbers}


def part_of(number: str) -> str:
    """The part of an evaluation that measures a number which a recipe may publish: ``elbo`` for ``rate``.

    Raises:
        UsageError: if none does.
    """
    prefix, _, samples = number.partition("_")
    if prefix == "nll" and samples.isdecimal() and int(samples):
        return "nll"
    if number not in _PART_OF:
        raise UsageError(f"no number {number!r}{did_you_mean(number, (*_PART_OF, 'nll_5000'))}")
    return _PART_OF[number]


@dataclass(frozen=True)
class Recipe:
    """A named configuration and what is known about it.

    Args:
        make: returns the run, whose ``recipe`` is this one's name.
        title: one line that says what it is.
        source: the description that it implements.
        published: the source's numbers on MNIST's test set, or those of a rerun that it names, by the metric's name
            (nats per image, or units); empty if there are none for the same data and protocol.
        minutes: of processor time, what full length took when it was measured; None: not known.
        shown: what ``reproduce`` measures where nothing is published.
    """

    make: Callable[[], Run]
    title: str
    source: str
    published: dict[str, float]
    minutes: float | None
    shown: tuple[str, ...] = ("negative_elbo", "distortion", "rate")
