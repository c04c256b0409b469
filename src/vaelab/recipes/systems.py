"""The five public descriptions of MNIST VAEs, each by name, and the fastest way to beat one of them."""

from __future__ import annotations

from vaelab import specs
from vaelab.config import Augment, Picture, Run, Training
from vaelab.objectives import ELBO
from vaelab.recipes.recipe import PICTURES, Recipe


def mlp() -> Run:
    """784-512-(loc, scale)-512-784: the smallest VAE that works, and the one to start reading with."""
    return Run(
        recipe="mlp",
        encoder=specs.MLPEncoder((512,)),
        posterior=specs.DiagonalNormal(20),
        decoder=specs.MLPDecoder((512,)),
        training=Training(epochs=30, batch_size=128),
        bf16_gap=0.003,  # benchmarks/results/time-mlp.json
        pictures=(
            Picture("progress", "progress/epoch_{epoch:04d}.png", every=1),
            Picture("latent", "latent_space.png"),
            *PICTURES,
        ),
    )


def mlp_2d() -> Run:
    """Two fully connected layers each way and two latent dimensions, so that the latent space can be looked at."""
    return Run(
        recipe="mlp-2d",
        encoder=specs.MLPEncoder((512, 256)),
        posterior=specs.DiagonalNormal(2),
        decoder=specs.MLPDecoder((256, 512)),
        training=Training(epochs=20, batch_size=128),
        schedule=specs.Constant(1e-3),
        pictures=(
            Picture("progress", "progress/epoch_{epoch:04d}.png", every=1),
            Picture("loss_curve", "loss_curve.png"),
            Picture("reconstructions", "recon_epoch_{epoch}.png", every=1),
            Picture("samples", "samples.png"),
            Picture("latent", "latent_2d.png"),
        ),
    )


def conv_2d() -> Run:
    """A convolutional VAE with a two-dimensional bottleneck: the manifold of *Auto-Encoding Variational Bayes*."""
    return Run(
        recipe="conv-2d",
        encoder=specs.ConvEncoder((32, 64), hidden_dims=(256,)),
        posterior=specs.DiagonalNormal(2),
        decoder=specs.ConvDecoder((64, 32), hidden_dims=(256,)),
        training=Training(epochs=30, batch_size=128),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=1e-3, warmup_epochs=1),
        pictures=(
            Picture("progress", "progress/epoch_{epoch:04d}.png", every=1),
            Picture("manifold", "manifold.png"),
            Picture("samples", "samples.png"),
            Picture("latent", "latent_2d.png"),
            Picture("reconstructions", "reconstructions.png"),
            Picture("loss_curve", "loss_curve.png"),
        ),
    )


def conv_warmup() -> Run:
    """A convolutional VAE with KL warm-up, ReduceLROnPlateau and early stopping, and animations through its latents."""
    return Run(
        recipe="conv-warmup",
        encoder=specs.ConvEncoder((32, 64), hidden_dims=(256,)),
        posterior=specs.DiagonalNormal(16),
        decoder=specs.ConvDecoder((64, 32), hidden_dims=(256,)),
        objective=ELBO(beta=1.0, kl_warmup_epochs=5),
        schedule=specs.Plateau(1e-3, lr_factor=0.5, lr_patience=2, min_lr=1e-5),
        training=Training(epochs=40, batch_size=128, patience=6),
        pictures=(
            Picture("progress", "progress/epoch_{epoch:04d}.png", every=1),
            Picture("animation_1_to_9", "anim_1_to_9.gif"),
            Picture("animation_pi", "anim_pi_digits.gif"),
            Picture("samples", "samples.png"),
            Picture("reconstructions", "reconstructions.png"),
            Picture("training_history", "training_history.png"),
        ),
    )


def conv_beta() -> Run:
    """A convolutional beta-VAE with batch norm, dropout, augmentation, KL annealing and warm-up + cosine."""
    return Run(
        recipe="conv-beta",
        # SiLU and one dense layer of 256 on either side are ours: the source names neither (docs/results.md has what
        # they are worth).
        encoder=specs.ConvEncoder((32, 64, 128), (256,), batch_norm=True, dropout=0.05, activation="silu"),
        posterior=specs.DiagonalNormal(32),
        decoder=specs.ConvDecoder((128, 64, 32), (256,), batch_norm=True, activation="silu"),
        objective=ELBO(beta=0.8, kl_warmup_epochs=20),
        optimizer=specs.AdamW(weight_decay=1e-5),
        schedule=specs.WarmupCosine(base_lr=1e-4, max_lr=3e-4, warmup_epochs=10),
        augment=Augment(rotate=5.0, shift=1.0, augment_prob=0.1),
        training=Training(epochs=120, batch_size=256, clip_norm=1.0),
        pictures=(
            Picture("progress", "progress/epoch_{epoch:04d}.png", every=1),
            Picture("samples", "samples_epoch_{epoch}.png", every=10),
            Picture("reconstructions", "recon_epoch_{epoch}.png", every=10),
            Picture("training_history", "training_history.png", every=10),
            Picture("latent", "latent_space.png"),
        ),
    )


def fast() -> Run:
    """A fully connected beta-VAE that beats conv-beta's published reconstruction and KL in seconds.

    Chosen on the validation images: large steps (6 epochs at up to 7e-3) that Adam with short memories can bear, and an
    average of the weights instead of small steps at the end. Glorot's initial weights are worth 5 nats here.
    """
    return Run(
        recipe="fast",
        encoder=specs.MLPEncoder((512, 384), activation="silu"),
        posterior=specs.DiagonalNormal(24),
        decoder=specs.MLPDecoder((384, 512), activation="silu"),
        objective=ELBO(beta=0.6),
        optimizer=specs.AdamW(adam_betas=(0.85, 0.98)),
        schedule=specs.WarmupCosine(base_lr=1e-3, max_lr=7e-3, warmup_epochs=0.8),
        training=Training(epochs=6, batch_size=192, init="glorot", ema_decay=0.985),
        bf16_gap=0.006,  # benchmarks/results/time-fast.json
        pictures=PICTURES,
    )


# Five public descriptions of VAEs on MNIST, by title and number.
_DESCRIPTIONS = [
    f"{title}, a public description ({number})"
    for title, number in (
        ("Variational Autoencoder (VAE) on MNIST", "000_577eaa41b4d2401e"),
        ("Variational Autoencoder (VAE) on MNIST", "001_7984c2f954c33838"),
        ("Variational Autoencoder (VAE)", "002_4bebf74351286ed5"),
        ("Variational Auto Encoder", "003_92a4640234886241"),
        ("Convolutional Variational Autoencoder for MNIST", "004_b017f747db271a51"),
    )
]

RECIPES: dict[str, Recipe] = {
    "conv-warmup": Recipe(
        conv_warmup, "conv VAE, KL warm-up, plateau schedule, early stopping, animations", _DESCRIPTIONS[0], {}, 18
    ),
    "mlp": Recipe(mlp, "784-512-20 MLP VAE, the one to start reading with", _DESCRIPTIONS[1], {}, 4),
    "mlp-2d": Recipe(mlp_2d, "two-layer MLP VAE with 2 latent dimensions", _DESCRIPTIONS[2], {}, 2),
    "conv-2d": Recipe(conv_2d, "conv VAE with 2 latent dimensions and its manifold", _DESCRIPTIONS[3], {}, 14),
    "conv-beta": Recipe(
        conv_beta, "conv beta-VAE, batch norm, dropout, annealing, augmentation", _DESCRIPTIONS[4],
        {"distortion": 71.16, "rate": 29.79, "objective": 95.00}, 77,
    ),
    "fast": Recipe(
        fast, "conv-beta's published test result beaten in seconds, fully connected", _DESCRIPTIONS[4],
        {"distortion": 71.16, "rate": 29.79}, 0.5,
    ),
}  # fmt: skip
