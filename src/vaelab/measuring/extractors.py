"""The feature extractors of a data set, trained once and kept in the user's cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

from platformdirs import user_cache_path

from vaelab.data.datasets import Dataset
from vaelab.errors import FailureError
from vaelab.evaluate.features import EXTRACTOR_SEEDS, Extractor, train_extractor
from vaelab.progress import Bar
from vaelab.runs.checkpoint import load_tensors, save_tensors

VERSION = 1  # raised when an extractor of the same data and seed would come out another


def extractors_for(data: Dataset, bar: Bar, folder: Path | None = None) -> list[Extractor]:
    """The three extractors of a data set: from the cache, or trained (a minute or two on MNIST) and put there.

    Args:
        data: the data set as it is, grey.
        bar: shows the training.
        folder: where they are kept; None: the user's cache folder.

    Raises:
        UsageError: if the data have no labels, or are binarized.
    """
    folder = folder or user_cache_path("vaelab", appauthor=False) / "extractors"
    digest = hashlib.sha256(data.sha256("train").encode())
    if data.train.y is not None:  # the same images may be labelled in several ways
        digest.update(data.train.y.cpu().numpy().tobytes())
    name = f"{data.name}-{digest.hexdigest()[:16]}-v{VERSION}"
    return [_extractor(data, seed, bar, folder / f"{name}-s{seed}.pt") for seed in EXTRACTOR_SEEDS]


def _extractor(data: Dataset, seed: int, bar: Bar, path: Path) -> Extractor:
    if path.exists():
        saved = load_tensors(path)
        extractor = Extractor(data.shape, saved["classes"])
        try:
            extractor.load_state_dict(saved["weights"])
        except RuntimeError as error:
            raise FailureError(f"{path} does not fit: remove it, and it is trained anew") from error
        return extractor.eval().requires_grad_(False)
    bar.begin(f"training feature extractor {seed + 1} of {len(EXTRACTOR_SEEDS)} on {data.name}")
    extractor = train_extractor(data.to("cpu"), seed, on_step=bar.advance)
    classes = extractor.classify.out_features
    save_tensors(path, {"classes": classes, "weights": extractor.state_dict()})
    return extractor
