"""A variational autoencoder from data to pictures, in one screen of Python.

    python examples/train_vae.py                                # MNIST, 30 epochs
    python examples/train_vae.py --data digits --epochs 5       # scikit-learn's digits, no download

An image x is encoded as a normal distribution q(z|x), a z is drawn from it (z = mu + sigma * eps), and decoded as a
distribution p(x|z) of images. Training minimises the reconstruction loss -log p(x|z) plus the KL divergence from q(z|x)
to the standard normal prior: the negative evidence lower bound.
"""

from pathlib import Path

import torch
import tyro

import vaelab as v


def main(data: str = "mnist", epochs: int = 30, out: Path = Path("vae_example")) -> None:
    """Train the recipe `mlp` (784-512-20-512-784), measure it, and draw its latent space and samples."""
    run = v.override(v.recipes.mlp(), data=data, epochs=epochs)
    dataset = v.load(data)

    def report(epoch: v.train.Epoch) -> None:
        last = epoch.history[-1]
        print(f"epoch {epoch.number}: loss {last['loss']:.2f}, validation {last['validation_loss']:.2f} nats per image")

    model = v.fit(run, dataset, on_epoch_end=[report])

    for name, estimate in v.evaluate.evaluate(model, run, dataset, "test").items():
        print(f"{name}: {estimate}")

    # The model is three distributions: p(z), q(z|x) and p(x|z). This is the whole of a VAE, by hand:
    x = dataset.test.rows(slice(0, 5)).x
    qz = model.posterior(x)
    z = qz.rsample()
    reconstruction_loss = -model.likelihood(z).log_prob(x)
    kl = torch.distributions.kl_divergence(qz, model.prior())
    print("five images, reconstruction loss + KL:", (reconstruction_loss + kl).tolist())

    out.mkdir(parents=True, exist_ok=True)
    images = dataset.test.rows(slice(None))
    labels = None if images.y is None else images.y.numpy()
    v.figures.latent_map(v.figures.encode(model, images.x), labels, dataset.classes).savefig(out / "latent_space.png")
    v.figures.samples(model, 100).savefig(out / "samples.png")
    v.figures.reconstructions(model, images.x[:30]).savefig(out / "reconstructions.png")
    print(f"pictures in {out}")


if __name__ == "__main__":
    tyro.cli(main)
