"""Models that are known for what they do, and not by a likelihood: codes, factors, decoders without a prior."""

from __future__ import annotations

from vaelab import specs
from vaelab.config import Data, Picture, Run, Training
from vaelab.objectives import ELBO, RAE, BetaTC, Factor
from vaelab.recipes.recipe import PICTURES, Recipe


def vq() -> Run:
    """A VQ-VAE: 7x7 codes out of 512, residual networks; the prior over the codes is uniform.

    Cross-entropy in place of the paper's squared error: pixels of MNIST are next to 0 and 1, where a sigmoid's squared
    error has no gradient to come back from (measured: with a Gaussian of sigma 0.1 the first epoch ended in black).
    """
    return Run(
        recipe="vq",
        encoder=specs.ResidualEncoder((32, 64)),
        posterior=specs.VectorQuantized(grid=(7, 7), num_codes=512, code_dim=32),
        prior=specs.UniformCodes(),
        decoder=specs.ResidualDecoder((64, 32), from_grid=True),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=1e-3, warmup_epochs=0.5),
        training=Training(epochs=10, batch_size=128),
        pictures=PICTURES,
    )


def rae() -> Run:
    """A regularised autoencoder (RAE-L2): 16 latents; ``vaelab refit`` gives it a prior afterwards."""
    return Run(
        recipe="rae",
        encoder=specs.ConvEncoder((32, 64, 128), batch_norm=True),
        posterior=specs.Deterministic(16),
        decoder=specs.ConvDecoder((128, 64, 32), batch_norm=True),
        likelihood=specs.Gaussian(sigma=0.5**0.5, learn_sigma=False),  # minus log p: the squared error + a constant
        objective=RAE(),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=1e-3, warmup_epochs=1),
        training=Training(epochs=30, batch_size=128),
        pictures=PICTURES,
    )


def ae_2d() -> Run:
    """An autoencoder on the networks of ``mlp-2d``: what a latent space looks like to which no prior was held."""
    return Run(
        recipe="ae-2d",
        encoder=specs.MLPEncoder((512, 256)),
        posterior=specs.Deterministic(2),
        decoder=specs.MLPDecoder((256, 512)),
        objective=RAE(latent_weight=0.0, l2=0.0),
        training=Training(epochs=20, batch_size=128),
        pictures=(Picture("latent", "latent_2d.png"), Picture("manifold", "manifold.png"), *PICTURES),
    )


def sigma_vae() -> Run:
    """A sigma-VAE: the networks of ``mlp`` on real-valued pixels, their sigma the best one of each batch."""
    return Run(
        recipe="sigma-vae",
        encoder=specs.MLPEncoder((512,)),
        posterior=specs.DiagonalNormal(20),
        decoder=specs.MLPDecoder((512,)),
        likelihood=specs.OptimalGaussian(),
        training=Training(epochs=30, batch_size=128),
        pictures=PICTURES,
    )


def _sprites(name: str, objective: ELBO | BetaTC | Factor) -> Run:
    return Run(
        recipe=name,
        data=Data(source="sprites"),
        encoder=specs.ConvEncoder((32, 32, 64), (256,)),
        posterior=specs.DiagonalNormal(10),
        decoder=specs.ConvDecoder((64, 32, 32), (256,)),
        objective=objective,
        training=Training(epochs=30, batch_size=256),
        pictures=(Picture("traversals", "traversals.png"), *PICTURES),
    )


def tc() -> Run:
    """beta-TCVAE on sprites that are drawn from known factors."""
    return _sprites("tc", BetaTC())


def factor() -> Run:
    """FactorVAE on the same sprites, with the same networks."""
    return _sprites("factor", Factor())


_FACTORS = ("total_correlation", "mutual_information_gap", "distortion", "rate")

RECIPES: dict[str, Recipe] = {
    "vq": Recipe(
        vq, "VQ-VAE: 7x7 codes of 512, residual networks",
        "van den Oord, Vinyals & Kavukcuoglu (2017), https://arxiv.org/abs/1711.00937",
        {}, 4, ("perplexity", "mse", "distortion"),
    ),
    "rae": Recipe(
        rae, "regularised autoencoder (RAE-L2), 16 latents; its prior is fitted afterwards",
        "Ghosh et al. (2020), https://arxiv.org/abs/1903.12436", {}, 7, ("distortion", "mse"),
    ),
    "ae-2d": Recipe(
        ae_2d, "autoencoder with 2 latents: mlp-2d without its prior",
        "Hinton & Salakhutdinov (2006), https://doi.org/10.1126/science.1127647", {}, 2, ("distortion", "mse"),
    ),
    "sigma-vae": Recipe(
        sigma_vae, "784-512-20 VAE on real-valued pixels with the best sigma",
        "Rybkin, Daniilidis & Levine (2021), https://arxiv.org/abs/2006.13202", {}, 1,
    ),
    "tc": Recipe(
        tc, "beta-TCVAE on sprites of known factors",
        "Chen et al. (2018), https://arxiv.org/abs/1802.04942", {}, 2, _FACTORS,
    ),
    "factor": Recipe(
        factor, "FactorVAE on sprites of known factors",
        "Kim & Mnih (2018), https://arxiv.org/abs/1802.05983", {}, 2, _FACTORS,
    ),
}  # fmt: skip
