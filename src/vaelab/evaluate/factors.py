r"""How codes lie to the factors of variation that made the images, where these are known (the data set ``sprites``).

``mutual_information_gap`` and ``disentanglement`` ask whether each factor has a dimension of its own;
``total_correlation`` how far the dimensions are from independent, which needs no factors. ``known_factors`` measures
all of them on all images of a data set, trained on or not, as the published scores are.

Shapes: N examples, D latent dimensions, F factors, V values of a factor, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaelab.data.datasets import EVALUATION_SEED, Dataset, Split
from vaelab.divergences import log_mean_exp
from vaelab.errors import UsageError
from vaelab.evaluate import latents
from vaelab.evaluate.estimate import Estimate
from vaelab.evaluate.latents import RESAMPLES, Codes
from vaelab.evaluate.undefined import as_defined
from vaelab.models import VAE
from vaelab.posteriors import NormalPosterior

Array = NDArray[np.float64]
Factors = NDArray[np.int64]

PARTS = 5  # of the examples, each with classifiers of its own
TREES = 20
SINGULAR = 1e-10  # the least eigenvalue of correlations: codes are computed in fp32, whose rounding leaves about that
_ENTRIES = 2**22  # numbers of a block of the (N, N) matrix of one dimension: 32 MB


# --- all of them ------------------------------------------------------------------------------------------------------


def known_factors(model: VAE, data: Dataset, images: int | None = None) -> tuple[dict[str, Estimate], list[str]]:
    """Every score of this module, and why those are left out that this model cannot have, a sentence each.

    Args:
        model: the trained model.
        data: a data set whose factors are known.
        images: so many images, drawn at random; None: all.

    Raises:
        UsageError: if the factors are not known.
    """
    if data.factors is None:
        raise UsageError(f"nothing is known of what made the images of {data.name}: --data sprites has known factors")
    split = _everything(data, images)
    codes = latents.encode(model, replace(data, test=split), "test")
    made_by = data.factors(split.index.cpu().numpy())
    which = "all" if images is None else "random"
    protocol = f"{data.name}, {which} {len(split):,} images, {data.pixels}, 1 posterior sample"
    return as_defined({
        "total correlation": lambda: {"total_correlation": total_correlation(codes, protocol)},
        "mutual information gap": lambda: {"mutual_information_gap": mutual_information_gap(codes, made_by, protocol)},
        "disentanglement": lambda: disentanglement(codes, made_by, protocol),
    })  # fmt: skip


def _everything(data: Dataset, images: int | None) -> Split:
    """The images of all splits in the order of their rows, or some of them."""
    parts = [data.train, data.validation, data.test]
    index = torch.cat([part.index for part in parts])
    order = index.argsort()
    if images is not None:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(EVALUATION_SEED))[:images]]
    return Split(torch.cat([part.x for part in parts])[order], None, index[order])


# --- the mutual information gap -------------------------------------------------------------------------------------


def mutual_information_gap(codes: Codes, factors: Factors, protocol: str) -> Estimate:
    r"""How much more the best dimension knows of a factor than the second best, as a share of its entropy.

    .. math:: \frac1F \sum_k \frac{1}{H(v_k)} \big(\max_d I(z_d; v_k) - \max_{d \ne d_k} I(z_d; v_k)\big)

    1 if each factor is in one dimension and in no other, 0 if every factor is spread or not coded at all. The
    information is exact in the factors and the posteriors, a Monte Carlo mean over one draw of z for each example: see
    ``_pointwise_information``. The standard error is a bootstrap's over the examples, at fixed densities.

    Args:
        codes: N examples; more make the densities q(z_d) and q(z_d|v) better ones.
        factors: (N, F), the value of each factor, counted from 0.
        protocol: which examples.

    Raises:
        TypeError: if the posteriors have no density of each dimension.
        UsageError: if a factor does not vary, or there is a single dimension.

    Reference:
        Chen, Li, Grosse & Duvenaud (2018), Isolating Sources of Disentanglement in VAEs, section 4 and appendix C.
        https://arxiv.org/abs/1802.04942
    """
    pointwise, entropy = _pointwise_information(codes, factors), _entropies(factors)
    if pointwise.shape[1] < 2:
        raise UsageError("a mutual information gap is between two latent dimensions: this model has one")
    n = len(codes)
    counts = np.random.default_rng(EVALUATION_SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    resampled = (counts @ pointwise.reshape(n, -1)).reshape(RESAMPLES, *pointwise.shape[1:])
    about = f"{protocol}, mutual information gap, {factors.shape[1]} factors, densities of N={n:,} codes"
    stderr = float(_gaps(resampled, entropy).std(ddof=1)) if n > 1 else math.nan
    return Estimate(float(_gaps(pointwise.mean(0), entropy)), stderr, "of the entropy", n, about)


def _pointwise_information(codes: Codes, factors: Factors) -> Array:
    r"""What each dimension tells of each factor at each example's own draw, :math:`\log q(z_d|v_k) - \log q(z_d)`.

    (N, D, F), in nats; the means over the examples are the informations :math:`I(z_d; v_k)`.
    :math:`q(z_d|v) = \frac{1}{N_v} \sum_{n: v_n = v} q(z_d|x_n)` is the mean over all examples with that value, no
    histogram; each example's own posterior is among them, so that with few examples of a value it is too large (at most
    the logarithm of N). Chen et al. draw N from the whole data set, as the benchmark does.
    """
    if codes.log_scale is None:
        kind = type(codes.batches[0].qz).__name__
        raise TypeError(f"the information in a dimension is undefined for this model: its posterior {kind} has no "
                        "density of each dimension")  # fmt: skip
    _check(codes, factors)
    z, loc, log_scale = (torch.from_numpy(a) for a in (codes.z, codes.loc, codes.log_scale))
    found = np.empty((*z.shape, factors.shape[1]))
    for d in range(z.shape[1]):
        marginal = _log_density(z[:, d], loc[:, d], log_scale[:, d])
        for k in range(factors.shape[1]):
            for value in np.unique(factors[:, k]):
                rows = torch.from_numpy(np.flatnonzero(factors[:, k] == value))
                conditional = _log_density(z[rows, d], loc[rows, d], log_scale[rows, d])
                found[rows, d, k] = (conditional - marginal[rows]).numpy()
    return found


def _log_density(z: torch.Tensor, loc: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Of points (M,) under the mean of N normals of one dimension, (M,)."""
    components = NormalPosterior(loc[:, None], log_scale[:, None])
    blocks = z.split(max(1, _ENTRIES // len(loc)))
    return torch.cat([log_mean_exp(components.log_prob(block[:, None, None]).mT) for block in blocks])


def _gaps(information: Array, entropy: Array) -> Array:
    """Mean over factors of the gap between the two best of D, for (*leading, D, F)."""
    ordered = np.sort(information / entropy, -2)
    return (ordered[..., -1, :] - ordered[..., -2, :]).mean(-1)


def _entropies(factors: Factors) -> Array:
    """Of the values of each factor among the examples, (F,), in nats."""
    counts = [np.unique(column, return_counts=True)[1] / len(factors) for column in factors.T]
    if any(len(p) < 2 for p in counts):
        raise UsageError("a factor that is the same for all examples tells nothing: take more of them")
    return np.array([-(p * np.log(p)).sum() for p in counts])


# --- disentanglement, completeness, informativeness -----------------------------------------------------------------


def disentanglement(codes: Codes, factors: Factors, protocol: str) -> dict[str, Estimate]:
    r"""Three scores of the importance :math:`R_{dk}` that dimension d has in telling factor k: all 1 at best.

    ``disentanglement``: does a dimension matter to one factor only,
    :math:`\sum_d \rho_d (1 - H_F(R_{d \cdot}))` with weights :math:`\rho_d \propto \sum_k R_{dk}`; ``completeness``:
    is one dimension enough for a factor, the mean over k of :math:`1 - H_D(R_{\cdot k})`; entropies of the normalised
    importances, to the base F and D. ``informativeness``: the held-out accuracy, mean over factors.

    The examples are cut into 5 parts, each of which fits classifiers on its first half and scores them on the other;
    value and standard error are over the parts, which are independent at a fixed model.

    Note:
        The paper reads importances off a random forest too, one that predicts a factor as a number and whose error is
        the informativeness. An orientation is no number, so ours classifies values; its trees see all dimensions at
        each split, or a dimension of noise would be important wherever it stood alone.

    Raises:
        UsageError: if there are too few examples to cut, or a factor does not vary.

    Reference:
        Eastwood & Williams (2018), A Framework for the Quantitative Evaluation of Disentangled Representations.
        https://openreview.net/forum?id=By-7dz-AZ
    """
    _check(codes, factors)
    _entropies(factors)
    order = np.random.default_rng(EVALUATION_SEED).permutation(len(codes))
    z, v = codes.z[order], factors[order]
    scores = [_scores(z[part], v[part]) for part in np.array_split(np.arange(len(z)), PARTS)]
    about = f"{protocol}, random forests of {TREES} trees, {PARTS} parts of {len(codes) // PARTS:,} codes"
    units = {"disentanglement": "score", "completeness": "score", "informativeness": "accuracy"}
    return {name: replace(Estimate.of(np.array([score[name] for score in scores]), unit, about), n=len(codes))
            for name, unit in units.items()}  # fmt: skip


def _scores(z: Array, factors: Factors) -> dict[str, float]:
    half = len(z) // 2
    forests = [_forest(z[:half], column[:half]) for column in factors.T]
    importances = np.stack([forest.feature_importances_ for forest in forests], 1)  # (D, F)
    accuracy = [forest.score(z[half:], column[half:]) for forest, column in zip(forests, factors.T, strict=True)]
    if not importances.any():
        raise UsageError(f"{half} codes to fit on are too few for a forest to split: take more examples")
    weights = importances.sum(1) / importances.sum()
    return {
        "disentanglement": float(weights @ _purity(importances)),
        "completeness": float(_purity(importances.T).mean()),
        "informativeness": float(np.mean(accuracy)),
    }


def _forest(z: Array, values: Factors) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    if len(np.unique(values)) < 2:
        raise UsageError(f"{len(z)} codes to fit on hold one value of a factor: take more examples")
    # Leaves of a few examples: deeper trees split noise, and count it as important.
    settings: dict[str, Any] = {"max_features": None, "min_samples_leaf": 5, "random_state": EVALUATION_SEED}
    return RandomForestClassifier(TREES, **settings).fit(z, values)


def _purity(importances: Array) -> Array:
    """1 less the entropy of each row (A, B) of importances, normalised, to the base B; 0 for a row of zeros."""
    total = importances.sum(1, keepdims=True)
    p = np.divide(importances, total, out=np.full_like(importances, 1 / importances.shape[1]), where=total > 0)
    if importances.shape[1] < 2:
        raise UsageError("disentanglement and completeness compare two factors or dimensions at least: there is one")
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return 1 + (p * logs).sum(1) / math.log(importances.shape[1])


# --- total correlation ----------------------------------------------------------------------------------------------


def total_correlation(codes: Codes, protocol: str) -> Estimate:
    r"""The total correlation of the normal that has the codes' covariance :math:`\Sigma`, in nats.

    .. math:: \tfrac12 \big(\textstyle\sum_d \log \Sigma_{dd} - \log\det\Sigma\big)

    0 if no two dimensions are correlated. Cheap and exact for normal codes; it is blind to dependence that shows in no
    correlation, where the true one is larger. N independent codes have some D (D - 1) / (4 N) by chance. The standard
    error is a bootstrap's over the examples.

    Raises:
        UsageError: if the covariance has no inverse, as there are few codes or one dimension is a sum of others.

    Reference:
        Watanabe (1960), Information Theoretical Analysis of Multivariate Correlation, of normal variables.
        https://doi.org/10.1147/rd.41.0066
        Locatello et al. (2019), section 5.2, as a measure of codes. https://arxiv.org/abs/1811.12359
    """
    n, z = len(codes), codes.z - codes.z.mean(0)
    rng = np.random.default_rng(EVALUATION_SEED)
    value = _normal_correlation(z.T @ z / n)
    if not math.isfinite(value) or n <= z.shape[1]:
        raise UsageError(f"the covariance of {n} codes of {z.shape[1]} dimensions has no inverse: no total correlation")
    resampled = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        weights = rng.multinomial(n, np.full(n, 1 / n)) / n
        mean = weights @ z
        resampled[i] = _normal_correlation(z.T @ (weights[:, None] * z) - np.outer(mean, mean))
    if not np.isfinite(resampled).all():
        raise UsageError(f"{n} codes of {z.shape[1]} dimensions are too few for a total correlation: take more of them")
    about = f"{protocol}, of the normal with the covariance of N={n:,} codes"
    return Estimate(value, float(resampled.std(ddof=1)), "nats", n, about)


def _normal_correlation(covariance: Array) -> float:
    scale = np.sqrt(np.diagonal(covariance))
    if not scale.all():
        return math.inf
    eigenvalues = np.linalg.eigvalsh(covariance / np.outer(scale, scale))  # of the correlations: no scale matters
    return -0.5 * float(np.log(eigenvalues).sum()) if eigenvalues[0] > SINGULAR else math.inf


def _check(codes: Codes, factors: Factors) -> None:
    if factors.ndim != 2 or len(factors) != len(codes):
        raise UsageError(f"factors must be ({len(codes)}, F), a row for each code: they are {factors.shape}")
