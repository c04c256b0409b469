"""Time pythae's ``get_nll`` for 784-400-20: ``pythae_nll.py IMAGES.npy WEIGHTS.npz NUM_SAMPLES BATCH_SIZE THREADS``.

Runs in pythae's own environment, with the weights of vaelab's model, so that both estimate the same number. Prints the
seconds of each image and the mean log-likelihood. Its batch is as large as its user may make it: all samples at once.
"""

import json
import sys
import time

import numpy as np
import torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import nn


class Encoder(BaseEncoder):
    """784-400-(loc, log variance)."""

    def __init__(self, weights) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), linear(weights, "encoder"), nn.ReLU())
        self.head = linear(weights, "head")

    def forward(self, x):
        loc, log_scale = self.head(self.hidden(x)).chunk(2, dim=-1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):
    """20-400-784."""

    def __init__(self, weights) -> None:
        super().__init__()
        layers = (linear(weights, "decoder"), nn.ReLU(), linear(weights, "pixels"), nn.Sigmoid())
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        return ModelOutput(reconstruction=self.layers(z).reshape(-1, 1, 28, 28))


def linear(weights, name: str) -> nn.Linear:
    """A layer with these weights."""
    weight, bias = torch.from_numpy(weights[f"{name}_weight"]), torch.from_numpy(weights[f"{name}_bias"])
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def main() -> None:
    """Time and print."""
    images, weights = torch.from_numpy(np.load(sys.argv[1])), np.load(sys.argv[2])
    num_samples, batch_size, threads = map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce")
    model = VAE(config, Encoder(weights), Decoder(weights)).eval()
    seconds, values = [], []
    with torch.no_grad():  # a favour: its own loop keeps the gradient's graph
        for x in images:
            started = time.perf_counter()
            values.append(float(model.get_nll(x[None], n_samples=num_samples, batch_size=batch_size)))
            seconds.append(time.perf_counter() - started)
    print("RESULT " + json.dumps({"seconds": seconds, "log_px": values}))


if __name__ == "__main__":
    main()
