"""A VAE in scikit-learn's manners: ``fit``, ``transform``, ``score``, in pipelines and searches.

Shapes: N images, D latent dimensions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from vaelab import figures
from vaelab.config import Data, Run, override
from vaelab.data.datasets import SPLIT_SEED, Dataset, Protocol, Split, binarize
from vaelab.data.guard import require_fit
from vaelab.data.readers import Range, as_images
from vaelab.data.sources import MADE
from vaelab.errors import UsageError
from vaelab.evaluate.importance import importance_rows
from vaelab.evaluate.pieces import join
from vaelab.models import VAE
from vaelab.recipes import recipe
from vaelab.train import fit

Array = NDArray[Any]


class Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A recipe as an estimator of scikit-learn: a step of a ``Pipeline``, under ``GridSearchCV``, cloned and pickled.

    Images are arrays (N, H, W), (N, H, W, C), (N, C, H, W), or (N, F) with all pixels in a row; integers mean 0..255
    and floats 0..1.

    Args:
        recipe: a recipe's name, or a run.
        image_size: height and width of images that come as rows (N, F), where they are no squares.
        channels: 3, for colour in such rows.
        value_range: what values mean, where it is not as above: ``unit``, ``byte``, ``symmetric`` (-1..1).
        protocol: what is done to the pixels: see ``vaelab.load``.
        validation_fraction: the part of the images by which the best weights are chosen, and which is not learned from.
        num_samples: importance samples of ``score``.
        settings: any setting of the recipe by its flat name, as of ``vaelab.override``: ``epochs``, ``latent_dim``,
            ``prior="vamp"``.

    Attributes:
        model_: the trained model, a ``vaelab.VAE``.
        run_: its run.

    Raises:
        UsageError: by ``fit``, if a setting or the images cannot be meant. It is a ``ValueError``.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> digits = load_digits().images / 16
        >>> vae = Estimator("mlp", latent_dim=4, epochs=2).fit(digits)
        >>> vae.transform(digits[:10]).shape, vae.inverse_transform(vae.transform(digits[:10])).shape
        ((10, 4), (10, 8, 8))
    """

    def __init__(
        self, recipe: str | Run = "mlp", *, image_size: tuple[int, int] | None = None, channels: int | None = None,
        value_range: Range = "auto", protocol: Protocol = "grey", validation_fraction: float = 0.1,
        num_samples: int = 100, **settings: Any,
    ) -> None:  # fmt: skip
        self.recipe, self.image_size, self.channels = recipe, image_size, channels
        self.value_range: Range = value_range
        self.protocol: Protocol = protocol
        self.validation_fraction, self.num_samples, self.settings = validation_fraction, num_samples, settings

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, settings among them, by name."""
        return {**super().get_params(deep), **self.settings}

    def set_params(self, **params: Any) -> Estimator:
        """Change arguments or settings; whether the recipe has a setting is seen by ``fit``."""
        own = super().get_params(deep=False)
        for name, value in params.items():
            if name in own:
                setattr(self, name, value)
            else:
                self.settings = {**self.settings, name: value}
        return self

    def fit(self, X: Array, y: Any = None) -> Estimator:  # noqa: N803
        """Train on images; ``y`` is not used."""
        run = recipe(self.recipe) if isinstance(self.recipe, str) else self.recipe
        run, x = override(run, **self.settings), np.asarray(X)
        shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(x))
        held = math.ceil(self.validation_fraction * len(x))
        if not 0 < held < len(x):
            raise UsageError(f"validation_fraction {self.validation_fraction} of {len(x)} images is {held}: one at "
                             "least is needed to choose weights by, and one to learn from")  # fmt: skip
        self.model_ = fit(run, self._dataset(x[shuffled[held:]], x[shuffled[:held]]))
        self.run_, self._layout = replace(run, data=Data(MADE, self.protocol)), x.shape[1:]
        self.n_features_in_ = math.prod(self._layout)
        self._n_features_out = self.transform(x[:1]).shape[1]
        return self

    def transform(self, X: Array) -> NDArray[np.float32]:  # noqa: N803
        """Codes (N, D) that stand for images: posterior means, for normal posteriors."""
        model, data = self._trained(), self._scored(X)
        return figures.encode(model, data.test.rows(slice(None)).x)

    def inverse_transform(self, X: Array) -> NDArray[np.float32]:  # noqa: N803
        """What codes (N, D) decode to, the means of p(x|z): in [0, 1], in the layout of ``fit``'s images."""
        return self._decoded(torch.as_tensor(np.asarray(X), dtype=torch.float32))

    def sample(self, n_samples: int = 1, random_state: int = 0) -> NDArray[np.float32]:
        """Images that the model makes up, the means of p(x|z) for z from the prior, in the layout of ``fit``'s."""
        return self._decoded(figures.sample_prior(self._trained(), n_samples, random_state))

    def score_samples(self, X: Array) -> NDArray[np.float64]:  # noqa: N803
        r"""A lower bound on :math:`\log p(x)` of each image (N,), in nats, by ``num_samples`` importance samples.

        Of grey pixels under a Bernoulli likelihood it is no log-likelihood, though it ranks images.
        """
        model, data = self._trained(), self._scored(X)
        require_fit(model.likelihood_head, data, ("test",))
        return join(importance_rows(model, data, num_samples=self.num_samples))[f"k={self.num_samples}"]

    def score(self, X: Array, y: Any = None) -> float:  # noqa: N803
        """The mean of ``score_samples``: what a search over settings makes large."""
        return float(self.score_samples(X).mean())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def _trained(self) -> VAE:
        check_is_fitted(self)
        return self.model_

    def _scored(self, x: Array) -> Dataset:
        """Images as they are scored."""
        data = self._dataset(np.asarray(x))
        if data.shape != self.model_.shape:
            raise UsageError(
                f"X holds images of {data.shape} (C, H, W), and the model was trained on {self.model_.shape}"
            )
        return data

    def _dataset(self, x: Array, held: Array | None = None) -> Dataset:
        """Images to learn from and others to choose weights by; or, of one array, images as they are scored."""
        test, binary = self._split(x if held is None else held, 2)
        train = test if held is None else self._split(x, 0)[0]
        return Dataset("X", self.protocol, train, test, test, binary=binary, classes=None)

    def _split(self, x: Array, number: int) -> tuple[Split, bool]:
        """Images under the protocol, as the split of this number; and whether they are binary."""
        images = as_images(x, "X", image_size=self.image_size, channels=self.channels, value_range=self.value_range)
        pixels, drawn_later = images.x, self.protocol == "dynamic" and number == 0
        if not (images.binary or self.protocol == "grey" or drawn_later):
            pixels = binarize(images.x, self.protocol, number)
        split = Split(torch.from_numpy(pixels), None, torch.arange(len(pixels)))
        return split, images.binary or self.protocol != "grey"

    def _decoded(self, z: Tensor) -> NDArray[np.float32]:
        """Images of latents, in the layout of ``fit``'s."""
        x = figures.decode(self._trained(), z).numpy()
        if len(self._layout) == 3 and x.shape[1:] != self._layout:  # channels last
            x = x.transpose(0, 2, 3, 1)
        return x.reshape(len(x), *self._layout)
