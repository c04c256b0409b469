"""A VAE whose likelihood is known exactly: probabilistic PCA, x = W z + b + sigma * noise, z ~ N(0, I).

Its parts are specs of this file, made as a user would make their own. With orthogonal columns of W the true posterior is
a diagonal normal, so the best encoder is exact: one linear layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from vaelab import specs
from vaelab.data.datasets import Dataset, Split
from vaelab.likelihoods import Likelihood
from vaelab.models import VAE
from vaelab.specs import Spec

SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class LinearGaussian(Spec):
    """Normal pixels whose mean is the decoder's output itself."""

    part: ClassVar[str] = "oracle:LinearGaussianLikelihood"
    word: ClassVar[str] = "linear-gaussian"
    sigma: float = 0.5


class LinearGaussianLikelihood(Likelihood):
    support = "real"

    def forward(self, params):
        return Independent(Normal(params, self.spec.sigma, validate_args=False), 3, validate_args=False)


def linear_vae(latent_dim: int, sigma: float = 0.5, seed: int = 0) -> VAE:
    """A linear-Gaussian VAE whose encoder is the exact posterior."""
    torch.manual_seed(seed)
    model = VAE(
        specs.MLPEncoder(()),
        specs.DiagonalNormal(latent_dim),
        specs.StandardNormal(),
        specs.MLPDecoder(()),
        LinearGaussian(sigma),
        SHAPE,
    )
    pixels = SHAPE[1] * SHAPE[2]
    orthogonal, _ = torch.linalg.qr(torch.randn(pixels, latent_dim))
    lengths = torch.linspace(1.0, 3.0, latent_dim)
    decoder, head = model.decoder.layers[0], model.posterior_head.loc_and_log_scale
    with torch.no_grad():
        decoder.weight.copy_(orthogonal * lengths)
        decoder.bias.normal_()
        # p(z|x) = N(M^-1 W'(x - b), sigma^2 M^-1) with M = W'W + sigma^2 I, which is diagonal here.
        m = lengths**2 + sigma**2
        loc = (orthogonal * lengths / m).mT
        head.weight.copy_(torch.cat([loc, torch.zeros(latent_dim, pixels)]))
        head.bias.copy_(torch.cat([-loc @ decoder.bias, 0.5 * torch.log(sigma**2 / m)]))
    return model.eval()


def marginal(model: VAE) -> MultivariateNormal:
    """The exact p(x) of a linear VAE over flattened images."""
    decoder, sigma = model.decoder.layers[0], model.likelihood_head.spec.sigma
    w, b = decoder.weight.detach().double(), decoder.bias.detach().double()
    return MultivariateNormal(b, w @ w.mT + sigma**2 * torch.eye(len(b), dtype=torch.float64))


def exact_log_px(model: VAE, x: torch.Tensor) -> torch.Tensor:
    """log p(x) of each image, in nats."""
    return marginal(model).log_prob(x.flatten(1).double())


def sample_images(model: VAE, count: int, seed: int = 1) -> torch.Tensor:
    """Images from the model's own p(x)."""
    torch.manual_seed(seed)
    return marginal(model).sample((count,)).float().reshape(count, *SHAPE)


def bend(model, widen=0.0, shift=0.0):
    """Spoil the exact encoder: widen its scale by a factor e^widen, shift its mean."""
    bias = model.posterior_head.loc_and_log_scale.bias
    with torch.no_grad():
        half = len(bias) // 2
        bias[:half] += shift
        bias[half:] += widen
    return model


def dataset(x: torch.Tensor) -> Dataset:
    """These images as the whole of a data set, each split the same."""
    part = Split(x, None, torch.arange(len(x)))
    return Dataset("pPCA", "grey", part, part, part, binary=False, classes=None)
