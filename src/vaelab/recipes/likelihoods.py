"""Models whose published number is a likelihood: binarized MNIST, importance sampling."""

from __future__ import annotations

import dataclasses

from vaelab import specs
from vaelab.config import Data, Run, Training
from vaelab.objectives import ELBO, IWAE, PIWAE, DReG
from vaelab.recipes.recipe import PICTURES, Recipe


def burda_vae() -> Run:
    """The one-layer VAE of *Importance Weighted Autoencoders*: 784-200-200-50, tanh, dynamic binarization.

    Network, initial weights, data split (59,600 images to train on, 400 for validation) and epsilon of Adam are the
    paper's. The schedule is ours: theirs passes 3,280 times over the data in batches of 20.
    """
    return Run(
        recipe="burda-vae",
        data=Data(protocol="dynamic", validation_size=400),
        encoder=specs.MLPEncoder((200, 200), activation="tanh"),
        posterior=specs.DiagonalNormal(50),
        decoder=specs.MLPDecoder((200, 200), activation="tanh"),
        optimizer=specs.Adam(adam_eps=1e-4),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=2.5e-3, warmup_epochs=3),
        training=Training(epochs=700, batch_size=200, init="glorot"),
        pictures=PICTURES,
    )


def burda_iwae() -> Run:
    """The one-layer IWAE of *Importance Weighted Autoencoders*, k = 50; network and data as ``burda-vae``.

    The bound's samples grow from 1 to 5 to 50: what the first epochs learn needs no tight bound, and a step of 50
    samples costs ten times one of a single sample. The gradient flows through 8 of them, drawn by their weights. The
    paper passes 3,280 times over the data, with 50 throughout.
    """
    return dataclasses.replace(
        burda_vae(),
        recipe="burda-iwae",
        objective=IWAE(num_samples=50, warm_samples=(1, 5), warm_epochs=(50, 1300), backward_samples=8),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=2e-3, warmup_epochs=3),
        training=Training(epochs=2300, batch_size=100, init="glorot"),
        bf16_gap=0.039,  # benchmarks/results/time-burda-iwae.json
    )


def burda_iwae_5() -> Run:
    """``burda-iwae`` with k = 5 samples."""
    return dataclasses.replace(
        burda_iwae(),
        recipe="burda-iwae-5",
        objective=IWAE(num_samples=5, warm_samples=(1,), warm_epochs=(50,)),
        training=Training(epochs=1600, batch_size=100, init="glorot"),
    )


def burda_dreg() -> Run:
    """``burda-iwae`` by the doubly reparameterised gradient; fewer epochs with k = 50."""
    return dataclasses.replace(
        burda_iwae(),
        recipe="burda-dreg",
        objective=DReG(num_samples=50, warm_samples=(1, 5), warm_epochs=(100, 850), backward_samples=8),
        training=Training(epochs=1250, batch_size=100, init="glorot"),
        bf16_gap=0.044,  # benchmarks/results/time-burda-dreg.json
    )


def burda_piwae() -> Run:
    """``burda-iwae`` by PIWAE: the decoder from 64 samples, the encoder from 8 bounds of 8; fewer epochs.

    The bounds' samples grow from 1 to 2 to 8. The gradient flows through one sample of each bound, drawn by its weight.
    """
    return dataclasses.replace(
        burda_iwae(),
        recipe="burda-piwae",
        objective=PIWAE(num_samples=8, num_bounds=8, warm_samples=(1, 2), warm_epochs=(100, 650), backward_samples=1),
        bf16_gap=-0.026,  # benchmarks/results/time-burda-piwae.json
        training=Training(epochs=1100, batch_size=100, init="glorot"),
    )


def vamp() -> Run:
    """The one-layer VAE of *VAE with a VampPrior*: gated 300-300 networks, 40 latents, 500 pseudo-inputs.

    Networks, prior and data split (50,000 images to train on) are the paper's. Initial weights and schedule are ours:
    with batches of 500 half of what a step encodes is images, with 100, as in the authors' code, one part in six.
    """
    return Run(
        recipe="vamp",
        data=Data(protocol="dynamic", validation_size=1 / 6),
        encoder=specs.MLPEncoder((300, 300), activation="gated"),
        posterior=specs.DiagonalNormal(40),
        prior=specs.VampPrior(500),
        decoder=specs.MLPDecoder((300, 300), activation="gated"),
        objective=ELBO(kl_warmup_epochs=50),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=3e-3, warmup_epochs=3),
        training=Training(epochs=1000, batch_size=500, init="glorot"),
        pictures=PICTURES,
        bf16_gap=0.002,  # benchmarks/results/time-vamp.json
    )


def iaf() -> Run:
    """An inverse autoregressive posterior, on the networks of ``vamp`` with a standard normal prior.

    The paper's own numbers are of a deep convolutional ladder: here the flow stands beside ``vamp``, on equal networks.
    """
    return dataclasses.replace(
        vamp(),
        recipe="iaf",
        posterior=specs.IAF(40),
        prior=specs.StandardNormal(),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=1.5e-3, warmup_epochs=3),
        training=Training(epochs=300, batch_size=250),
        bf16_gap=None,  # of another model
    )


def s_vae() -> Run:
    """The hyperspherical VAE of d = 10: 784-256-128, von Mises-Fisher posteriors on the sphere in 11 dimensions.

    Batches of 64 are those of the rerun that it is compared with, which makes 500 epochs at a constant learning rate.
    """
    return Run(
        recipe="s-vae",
        data=Data(protocol="dynamic", validation_size=400),
        encoder=specs.MLPEncoder((256, 128)),
        posterior=specs.VonMisesFisher(11),
        prior=specs.UniformSphere(),
        decoder=specs.MLPDecoder((128, 256)),
        objective=ELBO(kl_warmup_epochs=10),
        schedule=specs.WarmupCosine(base_lr=1e-5, max_lr=1e-3, warmup_epochs=1),
        training=Training(epochs=400, batch_size=64),
        pictures=PICTURES,
    )


_BURDA = "Burda, Grosse & Salakhutdinov (2016), table 1, https://arxiv.org/abs/1509.00519"

RECIPES: dict[str, Recipe] = {
    "burda-vae": Recipe(
        burda_vae, "784-200-200-50 tanh VAE on binarized digits: a published likelihood", _BURDA,
        {"nll_5000": 86.76, "active_units": 19}, 59,
    ),
    "burda-iwae": Recipe(
        burda_iwae, "the same network by the importance-weighted bound, k = 50", _BURDA,
        {"nll_5000": 84.78, "active_units": 25}, 261,
    ),
    "vamp": Recipe(
        vamp, "gated 784-300-300-40 VAE whose prior is a mixture of its posteriors",
        "Tomczak & Welling (2018), https://arxiv.org/abs/1705.07120; number: Exemplar VAE, arXiv 2004.04795",
        {"nll_5000": 82.43}, 94,
    ),
    "burda-iwae-5": Recipe(
        burda_iwae_5, "the same with k = 5", _BURDA, {"nll_5000": 85.54, "active_units": 22}, 53
    ),
    "burda-dreg": Recipe(
        burda_dreg, "the same by the doubly reparameterised gradient, k = 50",
        "Tucker et al. (2019), https://arxiv.org/abs/1810.04152; number: a public rerun in TensorFlow 2 (nbip/IWAE)",
        {"nll_5000": 84.32}, 111,
    ),
    "burda-piwae": Recipe(
        burda_piwae, "the same by partially importance-weighted bounds, 8 x 8",
        "Rainforth et al. (2018), https://arxiv.org/abs/1802.04537; number: pythae's reproduction",
        {"nll_5000": 84.58}, 166,
    ),
    "iaf": Recipe(
        iaf, "gated 784-300-300-40 VAE with an inverse autoregressive posterior",
        "Kingma et al. (2016), https://arxiv.org/abs/1606.04934", {}, 18, ("nll_5000", "negative_elbo"),
    ),
    "s-vae": Recipe(
        s_vae, "784-256-128 VAE with von Mises-Fisher posteriors on a sphere",
        "Davidson et al. (2018), https://arxiv.org/abs/1804.00891; number: pythae's reproduction",
        {"nll_500": 93.13}, 14,
    ),
}  # fmt: skip
