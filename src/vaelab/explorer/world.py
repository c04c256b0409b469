"""What the explorer's page knows of a run, and what it may ask.

Shapes: N test images, S draws from the prior, C H W image, D latent dimensions, B rows of a request.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from vaelab import __version__, figures
from vaelab.data.datasets import BATCH, EVALUATION_SEED
from vaelab.drawing.scene import Scene, require_real, typical_of_each
from vaelab.evaluate import latents
from vaelab.export import Scorer
from vaelab.figures import How, Projection
from vaelab.figures.style import COLOURS
from vaelab.models import VAE

IMAGES = 2000  # of a map, at most
BYTES = 6 * 2**20  # of their pixels, at most
DRAWS = 1024  # from the prior
SCORED = 2000  # test images that a score is compared with, at most
TYPICAL = 12  # images to start from

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@final
@dataclass(frozen=True, eq=False)
class Score:
    """What a model makes of images: codes (B, D), their spread, the reconstruction (B, C, H, W), and nats (B,)."""

    loc: Floats
    scale: Floats
    mean: Bytes
    distortion: Floats
    rate: Floats


@final
class World:
    """A run as the page sees it: ``info`` for its text, arrays for what is drawn, and two questions to the model.

    Args:
        scene: the run.
        how: how codes get on the map.
        images: of the test split, at most so many.

    Raises:
        UsageError: if latents are not any real vectors, or images have no score, or the map does not fit.
    """

    def __init__(self, scene: Scene, how: How = "auto", images: int = IMAGES) -> None:
        self.scene = scene
        self.model: VAE = scene.model.eval()
        require_real(self.model, "exploring")
        self._scorer = Scorer(self.model)  # what a static page runs, too
        self._lock = threading.Lock()  # the model takes one question at a time: more would only share its threads
        split = scene.data.test
        count = max(1, min(images, BYTES // int(np.prod(self.model.shape)), len(split)))
        self.codes = latents.encode(self.model, scene.data, "test", limit=count).center.astype(np.float32)
        self.map: Projection = figures.project(self.codes, how)
        shown = split.rows(slice(count))
        self.images: Bytes = to_bytes(shown.x.cpu())
        self.draws: Floats = figures.sample_prior(self.model, DRAWS, EVALUATION_SEED).numpy().astype(np.float32)
        # As many as there are, whatever the map shows: a score should not depend on what is looked at.
        starts = range(0, min(SCORED, len(split)), BATCH)
        batches = (split.rows(slice(start, min(start + BATCH, SCORED))).x.cpu().numpy() for start in starts)
        parts = [self.score(batch) for batch in batches]
        totals = np.concatenate([part.distortion + part.rate for part in parts])
        self.labels = None if shown.y is None else shown.y.cpu().numpy()
        self.info = self._describe(scene, totals)

    def _describe(self, scene: Scene, totals: Floats) -> dict[str, Any]:
        """All that the page says and does not compute: one JSON object without a path of this machine."""
        is_likelihood = self.model.is_density(binary_data=scene.data.binary)
        what = "−ELBO" if is_likelihood else "cross-entropy + KL"
        rate, axes = scene.rate, self.map.axes
        # One of each class, where there are classes.
        few = TYPICAL if self.labels is None else min(TYPICAL, len(np.unique(self.labels)))
        return {
            "vaelab": __version__,
            "title": f"{scene.run.recipe} on {scene.data.name}",
            "epoch": scene.epoch,
            "shape": list(self.model.shape),
            "latent": self.model.latent_dim,
            "binary": scene.data.binary,
            "classes": None if scene.data.classes is None else list(scene.data.classes),
            "labels": None if self.labels is None else self.labels.tolist(),
            "colours": list(COLOURS),
            "count": len(self.codes),
            "draws": len(self.draws),
            "order": scene.order,
            "rate": None if rate is None else [round(float(r), 4) for r in rate],
            "typical": typical_of_each(self.codes, self.labels, few).tolist(),
            "map": {
                "how": self.map.how,
                "axes": [axis.translate(str.maketrans("12", "₁₂", "$_")) if "$" in axis else axis for axis in axes],
                "origin": None if self.map.origin is None else self.map.origin.tolist(),
                "directions": None if self.map.directions is None else self.map.directions.tolist(),
            },
            "score": {
                "what": f"{what} at the mean of q(z|x), nats",
                "sorted": [round(float(total), 2) for total in np.sort(totals[np.isfinite(totals)])],
            },
        }

    # questions

    def decode(self, z: Floats) -> Bytes:
        """Means of p(x|z) (B, C, H, W) for codes z (B, D), as bytes."""
        with self._lock, torch.inference_mode():
            return to_bytes(self.model.likelihood(torch.from_numpy(z)).mean)

    def score(self, x: Floats) -> Score:
        """What the model makes of images x (B, C, H, W) in [0, 1]: distortion at the mean of q(z|x), and rate."""
        with self._lock, torch.inference_mode():
            loc, scale, mean, distortion, rate = self._scorer(torch.from_numpy(x))
        return Score(loc.numpy(), scale.numpy(), to_bytes(mean), distortion.numpy(), rate.numpy())

    # arrays, as the page reads them

    def points(self) -> bytes:
        """Places on the map (N, 2), codes (N, D), then draws from the prior (S, D): float32, little-endian."""
        arrays = (self.map.points, self.codes, self.draws)
        return b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)

    def pixels(self) -> bytes:
        """The test images (N, C, H, W), a byte a value."""
        return self.images.tobytes()


def to_bytes(x: torch.Tensor) -> Bytes:
    """Images in [0, 1] as bytes."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
