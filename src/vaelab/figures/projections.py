"""From D latent dimensions to the two of a map.

Shapes: N codes, D latent dimensions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from vaelab.errors import UsageError
from vaelab.runtime import threads

How = Literal["auto", "own", "pca", "tsne", "umap"]
SEED = 0  # of the projections that draw: the same codes give the same map


@final
@dataclass(frozen=True, eq=False)
class Projection:
    """Codes in the plane.

    Args:
        how: the method.
        points: (N, 2).
        axes: what is written along x and y.
        origin, directions: (D,) and (2, D), where a point (x, y) stands for the code origin + x d1 + y d2; None where
            a point of the plane stands for no code (t-SNE, UMAP).
    """

    how: Literal["own", "pca", "tsne", "umap"]
    points: NDArray[np.float32]
    axes: tuple[str, str]
    origin: NDArray[np.float32] | None = None
    directions: NDArray[np.float32] | None = None


def project(codes: NDArray[np.floating], how: How = "auto") -> Projection:
    """Lay codes (N, D) out in the plane.

    ``own``: their first two dimensions, all that there are. ``pca``: the two directions of the greatest variance.
    ``tsne``, ``umap``: neighbours stay neighbours, and distances mean little. ``auto``: ``own`` for D up to 2, else
    ``pca``.

    Raises:
        UsageError: where the method does not fit: ``own`` for more than 2 dimensions, too few codes, no UMAP installed.

    Reference:
        van der Maaten & Hinton (2008), Visualizing Data using t-SNE. https://jmlr.org/papers/v9/vandermaaten08a.html
        McInnes, Healy & Melville (2018), UMAP. https://arxiv.org/abs/1802.03426
    """
    codes = np.asarray(codes, np.float32)
    count, size = codes.shape
    if how == "auto":
        how = "own" if size <= 2 else "pca"
    if how == "own":
        return _own(codes)
    least = {"pca": 2, "tsne": 3, "umap": 4}[how]
    if count < least:
        raise UsageError(f"a map by {_NAMES[how]} needs at least {least} images: there are {count}")
    if how == "pca":
        return _pca(codes)
    points = _tsne(codes) if how == "tsne" else _umap(codes)
    return Projection(how, np.asarray(points, np.float32), (f"{_NAMES[how]} 1", f"{_NAMES[how]} 2"))


_NAMES = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}


def _own(codes: NDArray[np.float32]) -> Projection:
    size = codes.shape[1]
    if size > 2:
        raise UsageError(f"a map of the latent dimensions themselves needs at most 2 of them: there are {size}")
    if size == 1:
        codes = np.concatenate([codes, np.zeros_like(codes)], 1)
    return Projection("own", codes, ("$z_1$", "$z_2$" if size == 2 else ""), np.zeros(size, np.float32),
                      np.eye(2, size, dtype=np.float32))  # fmt: skip


def _pca(codes: NDArray[np.float32]) -> Projection:
    from sklearn.decomposition import PCA

    if codes.shape[1] == 1:
        raise UsageError("a map by principal components needs at least 2 latent dimensions: there is 1")
    with np.errstate(invalid="ignore"):  # of codes that are all the same: no share of no variance
        pca = PCA(2, svd_solver="full").fit(codes)
    first, second = (f"principal component {i + 1} ({r:.0%} of the variance)"
                     for i, r in enumerate(np.nan_to_num(pca.explained_variance_ratio_)))  # fmt: skip
    return Projection("pca", np.asarray(pca.transform(codes), np.float32), (first, second),
                      np.asarray(pca.mean_, np.float32), np.asarray(pca.components_, np.float32))  # fmt: skip


def _tsne(codes: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity, init = min(30.0, (len(codes) - 1) / 3), "pca" if codes.shape[1] > 1 else "random"
    # On one thread: its threads wait for one another thousands of times, which on a busy machine takes minutes.
    with threadpool_limits(1):
        return TSNE(2, perplexity=perplexity, init=init, random_state=SEED).fit_transform(codes)


def _umap(codes: NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numba, about itself
            from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("a map by UMAP needs the package umap-learn: pip install umap-learn, or take tsne") from error
    neighbours = min(15, len(codes) - 1)
    # Its compiler, numba, sets the number of threads of the whole process: later results would depend on that.
    with warnings.catch_warnings(), threads(None):
        warnings.simplefilter("ignore")  # that a seed keeps it to one thread
        return UMAP(n_neighbors=neighbours, random_state=SEED).fit_transform(codes)
