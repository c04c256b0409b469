"""What classifiers can tell of codes: whether they are the prior's, and which class they belong to.

Shapes: N examples, D latent dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vaelab.data.datasets import EVALUATION_SEED
from vaelab.errors import UsageError
from vaelab.evaluate.estimate import Estimate
from vaelab.evaluate.latents import Array, Codes

TELLING = 20  # codes: of fewer a two-sample test tells nothing
NEIGHBOURS = 5


def two_sample_test(codes: Codes, protocol: str) -> Estimate:
    r"""Held-out accuracy of a classifier that tells z ~ q(z) from z ~ p(z): 0.5 where the two are the same.

    Half of the codes, drawn at random, and as many draws from the prior are trained on; the other halves are the n
    held-out points. The standard error is binomial, :math:`\sqrt{a (1 - a) / n}`. Under the hypothesis that the two are
    the same, accuracy has mean 0.5 and standard deviation :math:`\frac12 / \sqrt n`, whatever the classifier.

    Note:
        The classifier, two layers of 64 units, sees each standardised latent and its square: without the squares it
        overlooks a ring, or two clusters of the prior's mean and variance, in one or two of 50 dimensions.

    Raises:
        UsageError: for fewer than 20 codes.

    Reference:
        Lopez-Paz & Oquab (2017), Revisiting Classifier Two-Sample Tests, section 3. https://arxiv.org/abs/1610.06545
    """
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    n = len(codes)
    if n < TELLING:
        raise UsageError(f"a two-sample test of {n} codes tells nothing: encode at least {TELLING}")
    half = n // 2
    # A data set may be in order: the second half of MNIST's test file was written by other people than the first.
    z = codes.z[np.random.default_rng(EVALUATION_SEED).permutation(n)]
    train, test = (np.concatenate([z[part], codes.z_prior[part]]) for part in (slice(half), slice(half, n)))
    is_code_train, is_code_test = (np.repeat([True, False], size) for size in (half, n - half))
    classifier = MLPClassifier(
        (64, 64), alpha=2.0, early_stopping=True, n_iter_no_change=20, max_iter=100, random_state=EVALUATION_SEED
    )
    squares = FunctionTransformer(lambda x: np.concatenate([x, x**2], 1))
    pipeline = make_pipeline(StandardScaler(), squares, StandardScaler(), classifier)
    _fit(pipeline.fit, train, is_code_train)
    accuracy = float((pipeline.predict(test) == is_code_test).mean())
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(test))
    about = f"{protocol}, classifier two-sample test against the prior, 0.5: the same"
    return Estimate(accuracy, stderr, "accuracy", len(test), about)


def probes(train: Codes, test: Codes, protocol: str) -> dict[str, Estimate]:
    """How well the posterior means tell the classes apart: accuracy on ``test`` of classifiers fitted on ``train``.

    ``linear_probe``: logistic regression on standardised means. ``knn_probe``: a vote of the 5 nearest means, in the
    latent space as it is, where dimensions out of use do not count. Standard errors are over the test examples.

    Raises:
        TypeError: if the data have no labels.
        UsageError: if there are fewer than 5 codes or fewer than two classes to fit on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if train.y is None or test.y is None:
        raise TypeError("a probe is undefined here: the data have no labels")
    classes = len(np.unique(train.y))
    if len(train) < NEIGHBOURS or classes < 2:
        raise UsageError(f"a probe needs {NEIGHBOURS} codes and 2 classes to be fitted on: got {len(train)}, {classes}")
    classifiers = {
        "linear_probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "knn_probe": KNeighborsClassifier(NEIGHBOURS),
    }
    found: dict[str, Estimate] = {}
    for name, classifier in classifiers.items():
        _fit(classifier.fit, train.center, train.y)
        correct = (classifier.predict(test.center) == test.y).astype(np.float64)
        how = f"{NEIGHBOURS} nearest means" if name == "knn_probe" else "logistic regression on means"
        found[name] = Estimate.of(correct, "accuracy", f"{protocol}, {how}, fitted on {len(train):,} codes")
    return found


def _fit(fit: Callable[..., object], x: Array, y: NDArray[np.generic]) -> None:
    """Fit a classifier to the number of its steps: that it could go on is no news to the user."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit(x, y)
