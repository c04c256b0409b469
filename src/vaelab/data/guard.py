"""Whether a likelihood is one of these data: asked where a model and data meet, in training and in evaluation.

A number that comes out of a likelihood and data that do not belong together looks like any other, and often better. A
Bernoulli on grey pixels is the one exception: it is customary, bounded, and reported as what it is, a cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

from vaelab.data.datasets import Dataset, Split
from vaelab.errors import UsageError
from vaelab.likelihoods import Likelihood

_ROUNDING = 1e-3  # of a level: what dividing by 255 in fp32 leaves


def require_fit(likelihood: Likelihood, data: Dataset, splits: Sequence[str]) -> None:
    """Refuse a likelihood that is none of these data; looks at their pixels only as far as it must.

    Densities (support ``real`` or ``unit``) are refused on pixels that are 0 or 1, where they can grow without bound;
    ``unit`` and ``bytes`` on pixels outside [0, 1]; ``bytes`` on pixels that are not multiples of 1/255. Images kept as
    bytes need no look for the last two. (Training images that augmentation moves are scored at their nearest levels.)

    Args:
        likelihood: a model's.
        data: what it is to score, as it is before augmentation.
        splits: which of it.

    Raises:
        UsageError: naming the likelihood, the data, and what to take instead.
    """
    word, support = likelihood.spec.word, likelihood.support
    if support in ("real", "unit") and (data.binary or all(_only_0_and_1(data.split(name)) for name in splits)):
        raise UsageError(
            f"--likelihood {word} is a density of real-valued pixels, and those of {data.name} are 0 or 1: there it "
            "can grow without bound and means nothing; take --likelihood bernoulli"
        )
    if support in ("unit", "bytes"):
        floats = [split for split in map(data.split, splits) if split.x.is_floating_point()]
        for x in (x for split in floats for x in split.pieces()):
            low, high = float(x.min()), float(x.max())
            if not 0 <= low <= high <= 1:
                raise UsageError(
                    f"--likelihood {word} is of pixels in 0..1, and those of {data.name} go from {low:g} to {high:g}: "
                    "rescale them, or take --likelihood gaussian"
                )
            off = (x * 255 - (x * 255).round()).abs() > _ROUNDING
            if support == "bytes" and bool(off.any()):
                raise UsageError(
                    f"--likelihood {word} is of the 256 levels of 8-bit pixels, and {data.name} has others "
                    f"({float(x[off][0]):g} is no multiple of 1/255): save the images as bytes, or take "
                    "--likelihood gaussian"
                )


def _only_0_and_1(split: Split) -> bool:
    return all(bool(((x == 0) | (x == 1)).all()) for x in split.pieces())
