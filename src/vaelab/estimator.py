"""A VAE in scikit-learn's manners: ``fit``, ``transform``, ``score``, in pipelines and searches.

Shapes: N images, D latent dimensions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from vaelab import figures
from vaelab.config import Run, override
from vaelab.data.datasets import SPLIT_SEED, Dataset, Split, under
from vaelab.data.readers import Images, as_images
from vaelab.data.sources import MADE
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate.importance import importance_rows
from vaelab.evaluate.pieces import join
from vaelab.models import VAE
from vaelab.recipes import recipe
from vaelab.slots import recipes_added
from vaelab.train import fit


class Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A recipe as an estimator of scikit-learn: a step of a ``Pipeline``, under ``GridSearchCV``, cloned and pickled.

    Images are arrays (N, H, W), (N, H, W, C), (N, C, H, W), or (N, F) with all pixels in a row; integers mean 0..255
    and floats 0..1, and 0 and 1 alone are binary. What those of ``fit`` are is kept for all that come later.

    Args:
        recipe: a recipe's name, or a run.
        bound_samples: importance samples of ``score``.
        settings: any setting of the recipe by its flat name, as of ``vaelab.override``: ``epochs``, ``latent_dim``,
            ``prior="vamp"``; of the data ``protocol``, ``validation_size`` (images by which the best weights are
            chosen, and which are not learned from; default: a tenth), ``image_size`` of images in rows that are no
            squares, ``channels``, and ``range``, what their values mean. Under ``static`` and ``dynamic`` the draw of
            an image that is scored depends on its place in the array.

    Attributes:
        model_: the trained model, a ``vaelab.VAE``.
        run_: its run.

    Raises:
        UsageError: by ``fit`` and what follows, if a setting or the images cannot be meant. It is a ``ValueError``.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> digits = load_digits().images / 16
        >>> vae = Estimator("mlp", latent_dim=4, epochs=2).fit(digits)
        >>> vae.transform(digits[:10]).shape, vae.inverse_transform(vae.transform(digits[:10])).shape
        ((10, 4), (10, 8, 8))
    """

    _had_bytes = False  # also of one that was pickled before there was this

    def __init__(self, recipe: str | Run = "mlp", *, bound_samples: int = 100, **settings: Any) -> None:
        self.recipe, self.bound_samples, self.settings = recipe, bound_samples, settings

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, settings among them, by name."""
        return {**super().get_params(deep), **self.settings}

    def set_params(self, **params: Any) -> Estimator:
        """Change arguments or settings; whether the recipe has a setting is seen by ``fit``."""
        own = super().get_params(deep=False)
        for name, value in params.items():
            if "__" in name:
                raise UsageError(f"{name!r} is no setting: an Estimator has no steps")
            if name in own:
                setattr(self, name, value)
            else:
                self.settings = {**self.settings, name: value}
        return self

    def fit(self, X: ArrayLike, y: Any = None) -> Estimator:  # noqa: N803
        """Train on images; ``y`` is not used."""
        run, x = self._run(), _array(X)
        images = _images(x, run)
        settings = run.data
        if settings.value_range == "auto":  # else each array that comes later would be looked at anew
            kind = "unit" if x.dtype.kind == "f" or (images.binary and x.max() <= 1) else "byte"
            settings = replace(settings, value_range=kind)
        held = self.settings.get("validation_size") or 0.1  # a recipe's own is meant for its data
        held = math.ceil(held * len(x)) if held < 1 else int(held)
        if held >= len(x):
            raise UsageError(f"{held} of {len(x)} images are held out to choose weights by: none is left to learn from")
        rows = np.random.default_rng(SPLIT_SEED).permutation(len(x))
        run = replace(run, data=replace(settings, source=MADE))
        data = Dataset("X", settings.protocol, _split(images, rows[held:], run, 0), _split(images, rows[:held], run, 1),
                       _split(images, rows[:0], run, 2), binary=_is_binary(images, run), classes=None)  # fmt: skip
        model = fit(run, data)
        self.model_, self.run_, self._binary, self._layout = model, run, images.binary, x.shape[1:]
        self._had_bytes = x.dtype.kind != "f" and settings.value_range == "byte"
        self.n_features_in_ = math.prod(self._layout)
        self._n_features_out = self.transform(x[:1]).shape[1]
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        """Codes (N, D) that stand for images: posterior means, for normal posteriors."""
        model, data = self._trained(), self._scored(X)
        return figures.encode(model, data.test.rows(slice(None)).x)

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803
        """What codes (N, D) decode to, the means of p(x|z): in [0, 1], in the layout of ``fit``'s images."""
        self._trained()
        z = check_array(X, dtype="float32")
        if z.shape[1] != self._n_features_out:
            raise UsageError(f"X holds codes of {z.shape[1]} numbers, the model's have {self._n_features_out}")
        return self._decoded(torch.from_numpy(z))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> NDArray[np.float32]:
        """Images that the model makes up, the means of p(x|z) for z from the prior, in the layout of ``fit``'s."""
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return self._decoded(figures.sample_prior(self._trained(), n_samples, seed))

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        r"""A lower bound on :math:`\log p(x)` of each image (N,), in nats, by ``bound_samples`` importance samples.

        Of grey pixels under a Bernoulli likelihood it is no log-likelihood, though it ranks images.
        """
        model, data = self._trained(), self._scored(X)
        return join(importance_rows(model, data, num_samples=self.bound_samples))[f"k={self.bound_samples}"]

    def score(self, X: ArrayLike, y: Any = None) -> float:  # noqa: N803
        """The mean of ``score_samples``: what a search over settings makes large."""
        return float(self.score_samples(X).mean())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        if isinstance(self.recipe, str) and self.recipe in recipes_added:  # a process that is sent it knows no names
            return {**state, "recipe": recipe(self.recipe)}
        return state

    def _run(self) -> Run:
        run = recipe(self.recipe) if isinstance(self.recipe, str) else self.recipe
        if not isinstance(run, Run):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"recipe is {type(run).__name__}: give a recipe's name, or a run")
        if unused := sorted({"data", "test_size"} & self.settings.keys()):
            raise UsageError(f"{unused[0]!r} is no setting here: X is the data, and no part of it is kept for a test")
        return override(run, **self.settings)

    def _trained(self) -> VAE:
        check_is_fitted(self)
        return self.model_

    def _scored(self, x: ArrayLike) -> Dataset:
        """Images as they are scored: as those that were learned from, and of their shape."""
        x = _array(x)
        if self._had_bytes and x.dtype.kind == "f" and 0 < x.max(initial=0) <= 1:
            raise UsageError("X holds floats up to 1, and fit's images were integers in 0..255: give both alike")
        images = _images(x, self.run_)
        if self._binary and not images.binary:
            raise UsageError("X holds grey pixels, and the model was trained on binary ones: x > 0.5 makes them so")
        images = Images(images.x, binary=self._binary)
        split = _split(images, np.arange(len(images.x)), self.run_, 2)
        binary = _is_binary(images, self.run_)
        data = Dataset("X", self.run_.data.protocol, split, split, split, binary=binary, classes=None)
        if data.shape != self.model_.shape:
            raise UsageError(f"X holds images of {data.shape} (C, H, W), the model was trained on {self.model_.shape}")
        return data

    def _decoded(self, z: Tensor) -> NDArray[np.float32]:
        """Images of latents, in the layout of ``fit``'s."""
        x = figures.decode(self.model_, z).numpy()
        if len(self._layout) == 3 and x.shape[1:] != self._layout:  # channels last
            x = x.transpose(0, 2, 3, 1)
        return x.reshape(len(x), *self._layout)


def _array(x: ArrayLike) -> NDArray[Any]:
    """Any array of numbers, as scikit-learn reads it."""
    return check_array(x, dtype="numeric", ensure_2d=False, allow_nd=True, input_name="X")


def _images(x: NDArray[Any], run: Run) -> Images:
    how = run.data
    size = x.shape[1:] if x.ndim == 3 else how.image_size  # of samples the first axis is always their number
    try:
        return as_images(x, "X", image_size=size, channels=how.channels, value_range=how.value_range)
    except FailureError as error:  # what is damage to a file is a mistake in an argument
        raise UsageError(str(error)) from error


def _is_binary(images: Images, run: Run) -> bool:
    return images.binary or run.data.protocol != "grey"


def _split(images: Images, rows: NDArray[Any], run: Run, number: int) -> Split:
    """Rows of images under the protocol, as the split of this number (0: train)."""
    x = under(run.data.protocol, images.x[rows], number, binary=images.binary)
    return Split(torch.from_numpy(x), None, torch.arange(len(x)))
