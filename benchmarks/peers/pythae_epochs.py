"""Train 784-400-20 with pythae, and print the seconds of each epoch and the test ELBO.

    pythae_epochs.py TRAIN.npy TEST.npy EPOCHS SEED THREADS

Runs in pythae's own environment. Same network, batch size, optimizer, learning rate and loss as vaelab's side; nothing
is validated and no checkpoint is written during the epochs. Everything else is pythae's default.
"""

import json
import resource
import sys
import tempfile
import time

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import nn


class Encoder(BaseEncoder):
    """784-400-(loc, log variance)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU())
        self.loc, self.log_variance = nn.Linear(400, 20), nn.Linear(400, 20)

    def forward(self, x):
        h = self.hidden(x)
        return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))


class Decoder(BaseDecoder):
    """20-400-784."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())

    def forward(self, z):
        return ModelOutput(reconstruction=self.layers(z).reshape(-1, 1, 28, 28))


class Clock(TrainingCallback):
    """Times each epoch's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, training_config, **options) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, training_config, **options) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def load(path: str) -> BaseDataset:
    """Images as pythae takes them: floats."""
    images = torch.from_numpy(np.load(path)).reshape(-1, 1, 28, 28).float() / 255
    return BaseDataset(images, torch.zeros(len(images)))


def main() -> None:
    """Train and print."""
    epochs, seed, threads = map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce"), Encoder(), Decoder())
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder, num_epochs=epochs, per_device_train_batch_size=128, learning_rate=1e-3, no_cuda=True,
            seed=seed,
        )  # fmt: skip
        clock = Clock()
        trainer = BaseTrainer(model, load(sys.argv[1]), training_config=config, callbacks=[clock])
        trainer.train()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        model, test = trainer.model.eval(), load(sys.argv[2])
        with torch.no_grad():
            found = model({"data": test.data})
    distortion, rate = float(found.recon_loss), float(found.reg_loss)
    result = {"seconds": clock.seconds, "distortion": distortion, "rate": rate, "memory": memory}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
