"""The feature space in which sets of images are compared: the last hidden layer of a small classifier.

The usual Fréchet distance takes its features from a network trained on colour photographs of 299 x 299. Small images
are better described by a classifier of their own kind, trained here in under a minute, on any machine, to the same
weights each time. One training is not enough: the same samples scored 65.7, 67.9 and 71.1 with three seeds of one
extractor, so there are three, and a distance is their mean with its spread.

Shapes: N images, C H W image, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from vaelab import schedules
from vaelab.data.datasets import BATCH, Dataset, Split, unit
from vaelab.errors import UsageError
from vaelab.runtime import derived_seed, epoch_order, seeded
from vaelab.specs import Shape

# Constants of the protocol, never a run's: every model is measured by the same three networks.
EXTRACTOR_SEEDS = (0, 1, 2)
NUM_FEATURES = 64
CHANNELS = (16, 32)
TRAINING_BATCH = 128
LEARNING_RATE = 3e-3
MIN_STEPS = 1200


@final
class Extractor(nn.Module):
    """Two stride-2 3x3 convolutions and a dense layer of 64 features, each with a ReLU; then one logit for each class.

    Args:
        shape: (C, H, W) of one image.
        num_classes: how many classes it tells apart.
    """

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape
        area = -(-height // 4) * -(-width // 4)  # each convolution maps a side s to ceil(s/2)
        self.embed = nn.Sequential(
            nn.Conv2d(channels, CHANNELS[0], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS[0], CHANNELS[1], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(CHANNELS[1] * area, NUM_FEATURES, bias=False),
            # Without it a third to a half of the features were dead: 0 on every image of MNIST.
            nn.BatchNorm1d(NUM_FEATURES),
            nn.ReLU(),
        )
        self.classify = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        return self.classify(self.embed(x))


def train_extractor(
    data: Dataset, seed: int, *, epochs: int | None = None, on_step: Callable[[int, int], None] | None = None
) -> Extractor:
    """Train a classifier on a data set's training images, on the CPU; its weights depend on (data, seed, epochs) alone.

    Adam with a learning rate that falls from 3e-3 to 0 along half a cosine; 128 images a step, whole batches only. On
    one machine and thread count the weights repeat to the bit; elsewhere they differ, and so does ``weights_hash``.

    Args:
        data: a data set with labels, its training pixels not binarized: one feature space serves all protocols.
        seed: one of ``EXTRACTOR_SEEDS``.
        epochs: how often every image is seen; None: as often as makes at least 1,200 steps (three times on MNIST).
        on_step: called after each step with the number of steps done, and of all steps.

    Raises:
        UsageError: if the images have no labels or one class only, or are binarized.
    """
    train, y = _labelled(data)
    batch_size = min(TRAINING_BATCH, len(train))
    steps_per_epoch = len(train) // batch_size
    if epochs is None:
        epochs = -(-MIN_STEPS // steps_per_epoch)
    if epochs < 1:
        raise UsageError(f"an extractor trained for {epochs} epochs knows nothing: give epochs=1 or more")
    with seeded(derived_seed(seed, "extractor")):
        extractor = Extractor(data.shape, int(y.max()) + 1)
    total = epochs * steps_per_epoch
    optimizer = Adam(extractor.parameters(), LEARNING_RATE, fused=True)
    learning_rate = LambdaLR(optimizer, schedules.cosine(1.0, 0.0, total))
    step = 0
    for epoch in range(epochs):
        for rows in epoch_order(len(train), seed, epoch).split(batch_size)[:steps_per_epoch]:
            loss = cross_entropy(extractor(train.rows(rows).x), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learning_rate.step()
            step += 1
            if on_step is not None:
                on_step(step, total)
    return extractor.eval().requires_grad_(False)


def features(extractor: Extractor, x: Tensor, batch: int = BATCH) -> NDArray[np.float64]:
    """Features (N, F) of images.

    Args:
        extractor: the trained network.
        x: (N, C, H, W), floats in [0, 1] or bytes.
        batch: images at a time: a matter of memory alone.

    Raises:
        UsageError: if the images are not of the extractor's shape.
    """
    if tuple(x.shape[1:]) != extractor.shape:
        sizes = ["x".join(map(str, shape)) for shape in (x.shape[1:], extractor.shape)]
        raise UsageError(f"images of {sizes[0]} and an extractor for {sizes[1]}: train one on these images")
    device = next(extractor.parameters()).device
    with torch.no_grad():
        parts = [extractor.embed(unit(rows.to(device))) for rows in x.split(batch)]
    return torch.cat(parts).cpu().double().numpy()


def weights_hash(extractor: Extractor) -> str:
    """SHA-256 of the weights: of each name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(extractor.state_dict().items()):
        array = np.ascontiguousarray(value.cpu().numpy())
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _labelled(data: Dataset) -> tuple[Split, Tensor]:
    """The training split and its class numbers, on the CPU."""
    train = data.train.to("cpu")
    if train.y is None:
        raise UsageError(
            f"{data.name} has no labels: Fréchet distances are undefined for data without labels, "
            "since their features are those of a classifier"
        )
    if len(train.y.unique()) < 2:
        raise UsageError(f"the training images of {data.name} are all of one class: a classifier needs at least two")
    # Under "dynamic" the training split is kept grey.
    if data.protocol in ("static", "threshold"):
        raise UsageError(f"{data.name} was binarized ({data.protocol}): load it with protocol='grey' for an extractor")
    return train, train.y.long()
