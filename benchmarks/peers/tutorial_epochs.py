"""Train 784-400-20 as tutorials do, and print the seconds of each epoch and the test ELBO.

    tutorial_epochs.py TRAIN.npy TEST.npy EPOCHS SEED THREADS

Needs torch, NumPy and Pillow. A ``DataLoader`` makes a tensor of one PIL image at a time, by the steps of torchvision's
``ToTensor`` (whose package is not needed for them), shuffles and collates; the rest is the usual script.
"""

import json
import resource
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """One image at a time: PIL, then a float tensor in [0, 1]."""

    def __init__(self, path: str) -> None:
        self.images = np.load(path).reshape(-1, 28, 28)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        picture = Image.fromarray(self.images[index])
        x = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(28, 28, 1)
        return x.permute(2, 0, 1).contiguous().to(torch.float32).div(255), 0


class VAE(nn.Module):
    """784-400-20-400-784."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x):
        h = functional.relu(self.fc1(x))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(functional.relu(self.fc3(z)))), mu, logvar


def terms(reconstruction, x, mu, logvar):
    """Distortion and rate, summed over the batch."""
    distortion = functional.binary_cross_entropy(reconstruction, x, reduction="sum")
    return distortion, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def main() -> None:
    """Train and print."""
    epochs, seed, threads = map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(Images(sys.argv[1]), batch_size=128, shuffle=True)
    seconds = []
    for _ in range(epochs):
        started, total = time.perf_counter(), 0.0
        for x, _ in loader:
            x = x.view(-1, 784)
            optimizer.zero_grad()
            loss = sum(terms(*_with(model, x))) / len(x)
            loss.backward()
            total += loss.item()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    sums = np.zeros(2)
    with torch.no_grad():
        for x, _ in DataLoader(Images(sys.argv[2]), batch_size=500):
            sums += [float(term) for term in terms(*_with(model, x.view(-1, 784)))]
    distortion, rate = sums / len(np.load(sys.argv[2], mmap_mode="r"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"seconds": seconds, "distortion": distortion, "rate": rate, "memory": memory}))


def _with(model, x):
    reconstruction, mu, logvar = model(x)
    return reconstruction, x, mu, logvar


if __name__ == "__main__":
    main()
