"""The terms of the ELBO over a split, and the protocol that stands beside them.

Shapes: N data set.
"""

from __future__ import annotations

import math

import torch

from vaelab.config import Run
from vaelab.data.datasets import BATCH, Dataset, Split
from vaelab.data.guard import require_fit
from vaelab.errors import UsageError
from vaelab.evaluate.estimate import Estimate, evaluating
from vaelab.likelihoods import Support
from vaelab.models import VAE
from vaelab.objectives import ELBO, terms_as_defined


def evaluate(model: VAE, run: Run, data: Dataset, split: str = "test", num_samples: int = 1) -> dict[str, Estimate]:
    r"""The terms of the ELBO on a split, in nats per example.

    ``distortion`` :math:`-E_q[\log p(x|z)]`, ``rate`` :math:`D_{KL}(q(z|x) \| p(z))`, ``negative_elbo`` their sum, and
    where :math:`\beta \ne 1` the ``objective`` distortion + beta * rate, which is no bound on anything. Where the
    pixels have a likelihood, ``bits_per_dim`` is ``negative_elbo`` / (D log 2) for images of D pixels and channels: the
    customary number of 8-bit pixels where the likelihood is a mass over their 256 levels. Of a density it is another
    number, which depends on the unit of a pixel (to that of a 0..255 scale log2 256 = 8 bits would have to be added);
    the protocol says so. A model without a rate, as its posterior has no density, has a distortion alone.

    Args:
        model: the trained model.
        run: its configuration, for the objective's weights.
        data: the data set and its protocol.
        split: train, validation or test.
        num_samples: posterior samples per example, over which its distortion is averaged.

    Raises:
        UsageError: if the likelihood is none of these data, or the images are of another shape than the model's.
    """
    if data.shape != model.shape:
        raise UsageError(f"images of {data.name} are {data.shape}, the model's {model.shape}: choose data of its shape")
    require_fit(model.likelihood_head, data, (split,))
    # Row noise makes the batch size a matter of memory alone: some ten thousand decoded images at a time.
    batch_size = max(1, min(BATCH, 10_000 // num_samples))
    with evaluating(model):
        distortion, rate = terms_as_defined(model, data.batches(split, batch_size), num_samples)
    protocol = bound_protocol(model, data, split, f"{num_samples} posterior sample{'s' if num_samples > 1 else ''}")
    if rate is None:
        return {"distortion": Estimate.of(distortion, "nats", protocol)}
    values = {"negative_elbo": distortion + rate, "distortion": distortion, "rate": rate}
    if isinstance(run.objective, ELBO) and run.objective.beta != 1:
        values["objective"] = run.objective.at(math.inf).weigh(distortion, rate)
    estimates = {name: Estimate.of(value, "nats", protocol) for name, value in values.items()}
    if model.is_density(binary_data=data.binary):
        bits = (distortion + rate) / (math.prod(model.shape) * math.log(2))
        estimates["bits_per_dim"] = Estimate.of(bits, "bits", protocol)
    return estimates


def protocol_of(data: Dataset, split: str, how: str, rows: int | None = None) -> str:
    """The protocol of a number in words: which images, what was done to their pixels, how it was estimated.

    Args:
        data, split: what was scored.
        how: by which estimator.
        rows: how many images, where it is the first of the split alone.
    """
    first = f" (first {rows:,} images)" if rows is not None and rows < len(data.split(split)) else ""
    return f"{data.name} {split}{first}, {data.pixels}, {how}"


def bound_protocol(model: VAE, data: Dataset, split: str, how: str, rows: int | None = None) -> str:
    """The protocol of a bound on log p(x): what p(x) is of, and a warning where it bounds no likelihood.

    Args:
        model: whose likelihood it is.
        data, split, how, rows: see ``protocol_of``.
    """
    support = model.likelihood_head.support
    caveat = _OF_WHAT[support] if support != "binary" or data.binary else ", cross-entropy: not a likelihood"
    return protocol_of(data, split, how, rows) + caveat


# What a bound is of, where it may be asked; of binary pixels it is the probability.
_OF_WHAT: dict[Support, str] = {
    "binary": "", "bytes": ", mass over 256 levels", "unit": ", density over [0, 1]",
    "real": ", density of pixels scaled to [0, 1]",
}  # fmt: skip


def grey_floor(split: Split) -> float:
    r"""The least cross-entropy that any model can reach on grey pixels: the mean of :math:`\sum_i H(x_i)`, in nats.

    A Bernoulli whose mean is the pixel itself still pays the pixel's entropy, so BCE on grey images has a floor above 0
    (45.53 nats on MNIST's test set) and is no likelihood.
    """
    total = 0.0
    for piece in split.pieces():
        x = piece.cpu().double()
        total += float(-(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum())
    return total / len(split)
