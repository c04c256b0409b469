"""Picture quality: how well a model restores images, and how far its samples lie from real ones.

Shapes: N and M images, C H W image, F features, E extractors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaelab.data.datasets import BATCH, Dataset
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate.elbo import protocol_of
from vaelab.evaluate.estimate import Estimate, evaluating
from vaelab.evaluate.features import NUM_FEATURES, Extractor, features, weights_hash
from vaelab.models import VAE
from vaelab.runtime import derived_seed, generator, seeded

Array = NDArray[np.float64]

MAX_PSNR = 100.0  # dB: an exact reconstruction would count for infinity, and so would the mean over all images
NEIGHBOURS = 3  # k of precision and recall, as in their paper
_BLOCK = 2**23  # distances in memory at a time: 64 MiB


# --- reconstructions ------------------------------------------------------------------------------------------------


def reconstruction(model: VAE, data: Dataset, split: str = "test") -> dict[str, Estimate]:
    r"""How near the mean of p(x|z) at the center of q(z|x) comes to x; means over the images of a split.

    ``mse``: the mean squared error of a pixel in [0, 1].

    ``psnr`` :math:`10 \log_{10}(1 / \mathrm{MSE})` of each image, in dB. An image restored exactly, or nearer than 100
    dB, counts as 100 dB; the protocol says how many did.

    ``ssim``, at most 1, as scikit-image computes it with the settings of the paper: a Gaussian window of sigma 1.5 that
    is 11 pixels wide, moments without Bessel's correction, pixels in [0, 1], the mean over channels and over all places
    but a border of half a window. Where a side is below 11, the border is half of the largest odd width that fits.

    Args:
        model: the trained model.
        data: the data set and its protocol; under a binarizing one, grey means are compared with binary pixels.
        split: train, validation or test.

    Reference:
        Wang, Bovik, Sheikh & Simoncelli (2004), Image Quality Assessment: From Error Visibility to Structural
        Similarity, section III. https://doi.org/10.1109/TIP.2003.819861
    """
    errors: list[Array] = []
    similarities: list[Array] = []
    with evaluating(model):
        for batch, _ in data.batches(split, BATCH):
            x_hat = model.likelihood(model.center(batch.x)).mean
            pair = [images.cpu().double().numpy() for images in (batch.x, x_hat)]
            errors.append(((pair[0] - pair[1]) ** 2).mean((1, 2, 3)))
            similarities.append(_ssim(*pair))
    mse = np.concatenate(errors)
    with np.errstate(divide="ignore"):
        psnr = np.minimum(-10 * np.log10(mse), MAX_PSNR)
    protocol = protocol_of(data, split, "mean of p(x|z) at the center of q(z|x)")
    capped = int((psnr == MAX_PSNR).sum())
    note = f", {capped:,} images at or above {MAX_PSNR:g} dB counted as {MAX_PSNR:g} dB" if capped else ""
    return {
        "mse": Estimate.of(mse, "of a pixel", protocol),
        "psnr": Estimate.of(psnr, "dB", protocol + note),
        "ssim": Estimate.of(np.concatenate(similarities), "SSIM", protocol),
    }


def _ssim(x: Array, x_hat: Array) -> Array:
    from skimage.metrics import structural_similarity

    channels, side = x.shape[1], min(x.shape[2:])
    window = min(11, side - 1 + side % 2)
    if channels == 1:
        x, x_hat = x[:, 0], x_hat[:, 0]
    each = [
        structural_similarity(
            a, b, win_size=window, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
            channel_axis=None if channels == 1 else 0,
        )
        for a, b in zip(x, x_hat, strict=True)
    ]  # fmt: skip
    return np.array(each, np.float64)


# --- two sets of features -------------------------------------------------------------------------------------------


def frechet(a: Array, b: Array) -> float:
    r"""Fréchet distance between the normals that fit two sets of features (N, F) and (M, F).

    :math:`|\mu_a - \mu_b|^2 + \mathrm{tr}(S_a + S_b - 2 (S_a S_b)^{1/2})`, in squared units of the features. It shrinks
    as the sets grow: compare only distances between as many images.

    With :math:`S = R^T R`, R being the triangular factor of the centred features, :math:`\mathrm{tr}\,(S_a S_b)^{1/2}`
    is the sum of the singular values of :math:`R_a R_b^T`. No root of a covariance is taken, so a singular one costs no
    accuracy (features that are always 0, fewer images than features).

    Raises:
        UsageError: if a set has fewer than two images.
        FailureError: if a feature is not finite.
    Reference:
        Dowson & Landau (1982), The Fréchet Distance between Multivariate Normal Distributions.
        https://doi.org/10.1016/0047-259X(82)90077-X
        Heusel et al. (2017), GANs Trained by a Two Time-Scale Update Rule, section 2 (the FID). https://arxiv.org/abs/1706.08500
    Example:
        >>> a = np.array([[0.0, 0.0], [2.0, 0.0]])
        >>> frechet(a, a + [3.0, 4.0])
        25.0
    """
    _check(a, b, least=2)
    root_a, root_b = _root_of_covariance(a), _root_of_covariance(b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    distance = means + (root_a**2).sum() + (root_b**2).sum() - 2 * overlap
    return max(float(distance), 0.0)  # identical sets: 0 but for rounding


def _root_of_covariance(x: Array) -> Array:
    """R with R'R = the covariance (ddof = 1) of the rows of x."""
    return np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1)).R


def precision_recall(real: Array, generated: Array, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares of the generated images that look real (precision) and of the real ones that could be generated (recall).

    A set covers a point that lies no further from one of its members than that member's k-th nearest neighbour within
    the set, itself not counted. Precision is the share of generated features that the real set covers, recall the share
    of real features that the generated set covers. Both depend on k and on the sizes of the sets.

    Distances are computed block by block from the differences themselves: no more than 64 MiB of them at a time, and
    copies of an image lie at exactly 0. Two sets of 10,000 take some 15 seconds on one core.

    Args:
        real: features (N, F).
        generated: features (M, F).
        k: which neighbour's distance is a member's radius.

    Raises:
        UsageError: if a set has no k-th neighbours.
        FailureError: if a feature is not finite.
    Reference:
        Kynkäänniemi et al. (2019), Improved Precision and Recall Metric for Assessing Generative Models, section 3.
        https://arxiv.org/abs/1904.06991
    """
    if k < 1:
        raise UsageError(f"k = {k}: precision and recall need k = 1 neighbour or more")
    _check(real, generated, least=k + 1)
    ours, theirs = (torch.from_numpy(np.ascontiguousarray(x)) for x in (real, generated))
    radii, their_radii = _radii(ours, k), _radii(theirs, k)
    precise: list[Tensor] = []
    recalled = torch.zeros(len(ours), dtype=torch.bool)
    rows = _rows(ours)
    for x, radius in zip(theirs.split(rows), their_radii.split(rows), strict=True):
        distances = _distances(x, ours)
        precise.append((distances <= radii).any(1))
        recalled |= (distances <= radius[:, None]).any(0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radii(members: Tensor, k: int) -> Tensor:
    """The distance from each member to its k-th nearest neighbour: of the k + 1 nearest points, one is itself."""
    blocks = members.split(_rows(members))
    return torch.cat([_distances(x, members).topk(k + 1, largest=False).values[:, k] for x in blocks])


def _rows(members: Tensor) -> int:
    """How many points' distances to all members fit into a block."""
    return max(1, _BLOCK // len(members))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by |a|^2 + |b|^2 - 2ab, which is several times faster and leaves copies at some 1e-7 from each other: where a
    # model repeats itself, the radii are 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(a: Array, b: Array, least: int) -> None:
    for x in (a, b):
        if len(x) < least:
            raise UsageError(f"{len(x)} images are too few to compare: give {least} or more")
        if not np.isfinite(x).all():
            raise FailureError("a feature is not finite: so were the model's weights, or the images")


# --- samples --------------------------------------------------------------------------------------------------------


def sample_quality(
    model: VAE,
    data: Dataset,
    extractors: Sequence[Extractor],
    *,
    split: str = "test",
    num: int = 10_000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compare means of p(x|z), z ~ p(z), with as many real images of a split, and training images with the same ones.

    ``frechet`` is the distance of the samples, ``frechet_floor`` what the training images themselves would score (test
    images, where ``split`` is train), ``precision`` and ``recall`` those of ``precision_recall``. Each is the mean over
    the extractors, and ``stderr`` their spread: the standard deviation (ddof = 1) of the E values. All sets have the
    same size, the smallest of ``num`` and the two splits, since distances depend on it. Which images are taken is
    random, by ``seed``.

    The samples are means: grey, and without the likelihood's pixel noise. The real images are the split's as it is
    scored: under a binarizing protocol they are binary, and a distance contains that difference too.

    None of the numbers is comparable with a published FID or its kin: the feature space is this toolkit's own.

    Args:
        model: the trained model.
        data: the data set and its protocol.
        extractors: two or more, each from ``train_extractor`` with another seed.
        split: train, validation or test.
        num: how many images each set has at most.
        seed: of the latents and of the choice of images.

    Raises:
        UsageError: if there are fewer than two different extractors, or too few images.
        FailureError: if the model's samples are not finite.
    """
    hashes = [weights_hash(extractor)[:12] for extractor in extractors]
    if len(hashes) < 2 or len(set(hashes)) < len(hashes):
        raise UsageError("a Fréchet distance needs two extractors or more, each of another seed, to know its spread")
    other = "test" if split == "train" else "train"
    count = min(num, len(data.split(split)), len(data.split(other)))
    if count <= NEIGHBOURS:
        raise UsageError(f"{count} images of {data.name} are too few to compare: give {NEIGHBOURS + 1} or more")
    real = _embed(extractors, _chosen(data, split, count, seed))
    rest = _embed(extractors, _chosen(data, other, count, seed))
    generated = _embed(extractors, _samples(model, count, seed))
    covered = np.array([*map(precision_recall, real, generated)])
    against = f"against {count:,} images of {data.name} {split}, {data.pixels} at native size, seed {seed}"
    extracted = f"mean and s.d. over {len(hashes)} extractors ({', '.join(hashes)})"
    protocol = f"{count:,} means of p(x|z), z ~ p(z), {against}, {extracted}"
    floor_protocol = f"{count:,} images of {data.name} {other} {against}, {extracted}"
    distance, space = f"Fréchet distance ({NUM_FEATURES} features)", f"(k = {NEIGHBOURS}, {NUM_FEATURES} features)"
    found = {
        "frechet": (np.array([*map(frechet, real, generated)]), distance, protocol),
        "frechet_floor": (np.array([*map(frechet, real, rest)]), distance, floor_protocol),
        "precision": (covered[:, 0], f"precision {space}", protocol),
        "recall": (covered[:, 1], f"recall {space}", protocol),
    }
    return {
        name: Estimate(float(values.mean()), float(values.std(ddof=1)), unit, count, about)
        for name, (values, unit, about) in found.items()
    }


def why_no_comparison(data: Dataset, split: str) -> str | None:
    """Why a model's samples cannot be compared with the images of a split; None where they can."""
    y = data.train.y
    if y is None:
        return f"{data.name} has no labels, and samples are compared by the features of a classifier"
    if len(y.unique()) < 2:
        return f"the training images of {data.name} are all of one class, and a classifier needs at least two"
    count = min(len(data.split(split)), len(data.test if split == "train" else data.train))
    return None if count > NEIGHBOURS else f"{count} images are too few to compare: {NEIGHBOURS + 1} are the least"


def _embed(extractors: Sequence[Extractor], x: Tensor) -> list[Array]:
    return [features(extractor, x) for extractor in extractors]


def _samples(model: VAE, count: int, seed: int) -> Tensor:
    """Means (N, C, H, W) of p(x|z), z ~ p(z): the same for the same seed, and no global generator is touched."""
    # ``Distribution.sample`` takes no generator. On the CPU there is only one to restore, and every device gets the
    # same latents.
    twin = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
    with evaluating(model), evaluating(twin), seeded(derived_seed(seed, "prior")):
        prior = twin.prior()
        sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
        z = [prior.sample((size,)) for size in sizes]  # not all at once: a mixture draws from each of its components
        return torch.cat([model.likelihood(rows.to(model.device)).mean for rows in z])


def _chosen(data: Dataset, split: str, count: int, seed: int) -> Tensor:
    """Images (N, C, H, W) of a split as it is scored, chosen at random without replacement."""
    size = len(data.split(split))
    # Not the first ones: the first half of MNIST's test set is easier than the second.
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.randperm(size, generator=generator(seed, "images", split))[:count]] = True
    batches = zip(data.batches(split, BATCH), chosen.split(BATCH), strict=True)
    return torch.cat([batch.x[wanted.to(batch.x.device)] for (batch, _), wanted in batches])
