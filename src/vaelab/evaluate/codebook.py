"""How a model uses its codebook.

Shapes: N images, B batch, S sites, M codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from vaelab.data.datasets import BATCH, Dataset
from vaelab.evaluate.estimate import Estimate, evaluating
from vaelab.models import VAE
from vaelab.posteriors import CodePosterior


@final
@dataclass(frozen=True, eq=False)
class Usage:
    """Which codes some images take.

    Args:
        codes: (N, S), the number of the code at each site of each image.
        num_codes: M.
    """

    codes: NDArray[np.int64]
    num_codes: int

    @property
    def counts(self) -> NDArray[np.int64]:
        """(M,), how often each code is taken."""
        return np.bincount(self.codes.ravel(), minlength=self.num_codes)

    def perplexity(self, protocol: str) -> Estimate:
        r"""How many equally likely codes would be as hard to guess: :math:`\exp(-\sum_k p_k \log p_k)`, at most M.

        p is the share of each code among all sites of all images. The standard error is that of the entropy, a mean
        over images of :math:`-\frac1S \sum_s \log p_{k_s}`, times the perplexity (the delta method).
        """
        surprise = -np.log(self.counts / self.codes.size, where=self.counts > 0, out=np.zeros(self.num_codes))
        entropy = Estimate.of(surprise[self.codes].mean(1), "nats", protocol)
        value = float(np.exp(entropy.value))
        about = f"{protocol}, of {self.num_codes:,} codes, over {self.codes.shape[1]} sites"
        return Estimate(value, value * entropy.stderr, "codes", len(self.codes), about)

    def used(self, protocol: str) -> Estimate:
        r"""How many codes some image takes at least once.

        The standard error is that of a bootstrap over many images, as if codes were missed independently: a resample
        misses one that m images take with probability :math:`q = e^{-m}`, which makes a variance of
        :math:`\sum_k q_k (1 - q_k)`.
        """
        taken_by = np.zeros(self.num_codes)
        for row in self.codes:
            taken_by[np.unique(row)] += 1
        missed = np.exp(-taken_by[taken_by > 0])
        about = f"{protocol}, of {self.num_codes:,} codes"
        stderr = float(np.sqrt((missed * (1 - missed)).sum())) if len(self.codes) > 1 else float("nan")
        return Estimate(float((taken_by > 0).sum()), stderr, "codes", len(self.codes), about)


def codebook_usage(model: VAE, data: Dataset, split: str = "test") -> Usage:
    """The codes of a split's images.

    Args:
        model: with a codebook.
        data, split: what is encoded.

    Raises:
        TypeError: if the model has no codebook.
    """
    found: list[NDArray[np.int64]] = []
    with evaluating(model):
        for batch, _ in data.batches(split, BATCH):
            qz = model.posterior(batch.x)
            if not isinstance(qz, CodePosterior):
                raise TypeError(f"the use of a codebook is undefined for this model: {type(qz).__name__} has none")
            found.append(qz.codes.cpu().numpy())
    return Usage(np.concatenate(found), model.posterior_head.spec.num_codes)
