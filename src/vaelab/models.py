"""The model: encoder x posterior x prior x decoder x likelihood, and one draw from it.

Shapes: K samples, B batch, C H W image, D latent dimensions, L latent layers (1 here).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from vaelab.divergences import analytic_kl
from vaelab.errors import UsageError
from vaelab.likelihoods import Likelihood
from vaelab.posteriors import Head, LogDensity, Posterior, Space
from vaelab.priors import Prior
from vaelab.runtime import Noise
from vaelab.specs import Shape, Spec


@dataclass(frozen=True)
class Batch:
    """What an objective sees: images in [0, 1] (B, C, H, W), and labels and row numbers (B,) where there are any.

    ``total`` is N, the number of images of the split that they are rows of; None where they are all there is.
    """

    x: Tensor
    y: Tensor | None = None
    index: Tensor | None = None
    total: int | None = None


@dataclass(frozen=True)
class Draw:
    """K joint samples for B examples; all log-densities in nats.

    The log-densities of z are computed on first use: the ELBO with an analytic KL never reads them.

    Args:
        z: one entry a latent layer, each (K, B, *latent).
        log_px: (K, B), log p(x|z).
        penalty: (B,), what a posterior itself costs (a codebook's commitment); 0 elsewhere.
        qz: the posterior itself.
        pz: the prior itself.
        log_density: computes log q(z|x), (K, B); None where it is undefined (deterministic encoders).
    """

    z: tuple[Tensor, ...]
    log_px: Tensor
    penalty: Tensor
    qz: Distribution
    pz: Distribution
    log_density: LogDensity | None

    @cached_property
    def log_pz(self) -> Tensor:
        """(K, B), log p(z)."""
        return self.pz.log_prob(self.z[0])

    @cached_property
    def log_qz(self) -> Tensor | None:
        """(K, B), log q(z|x); None where it is undefined."""
        return None if self.log_density is None else self.log_density()

    @cached_property
    def kl(self) -> Tensor:
        r"""(L, B), the rate :math:`D_{KL}(q(z|x) \| p(z))`: analytic where known, else the sample estimate.

        Raises:
            TypeError: if the posterior has no density, and so no KL.
        """
        exact = analytic_kl(self.qz, self.pz)
        if exact is not None:
            return exact[None]
        return (self.require_log_qz("the KL") - self.log_pz).mean(0)[None]

    @property
    def log_w(self) -> Tensor:
        """(K, B), the log importance weights log p(x|z) + log p(z) - log q(z|x).

        Raises:
            TypeError: if the posterior has no density.
        """
        return self.log_px + self.log_pz - self.require_log_qz("an importance weight")

    def require_log_qz(self, what: str) -> Tensor:
        """(K, B), log q(z|x), for ``what``.

        Raises:
            TypeError: if the posterior has no density, naming ``what``.
        """
        if self.log_qz is None:
            raise TypeError(
                f"{what} is undefined for this model: its posterior {type(self.qz).__name__} has no density"
            )
        return self.log_qz


@final
class VAE(nn.Module):
    r"""A variational autoencoder: :math:`p(x, z) = p(z)\, p(x|z)` with an amortised posterior :math:`q(z|x)`.

    Args:
        encoder, posterior, prior, decoder, likelihood: specs of the parts.
        shape: (C, H, W) of one image.

    Reference:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes. https://arxiv.org/abs/1312.6114
        Rezende, Mohamed & Wierstra (2014), Stochastic Backpropagation. https://arxiv.org/abs/1401.4082

    Example:
        >>> import torch
        >>> from vaelab import specs
        >>> vae = VAE(specs.MLPEncoder(), specs.DiagonalNormal(2), specs.StandardNormal(), specs.MLPDecoder(),
        ...           specs.Bernoulli(), shape=(1, 28, 28))
        >>> x = torch.rand(8, 1, 28, 28)
        >>> vae.likelihood(vae.posterior(x).rsample((50,))).mean.shape
        torch.Size([50, 8, 1, 28, 28])
    """

    def __init__(
        self, encoder: Spec, posterior: Spec, prior: Spec, decoder: Spec, likelihood: Spec, shape: Shape
    ) -> None:
        super().__init__()
        self.shape = shape
        self._fixed_prior: Distribution | None = None
        self.encoder = encoder.build(shape)
        self.posterior_head: Head[Any] = posterior.build(self.encoder.out_features)
        self.latent_dim = self.posterior_head.latent_dim
        self.prior_part: Prior[Any] = prior.build(self.posterior_head, shape)
        _require_same_space(posterior, self.posterior_head, prior, self.prior_part)
        self.likelihood_head: Likelihood[Any] = likelihood.build(shape[0])
        out_shape = (shape[0] * self.likelihood_head.params_per_channel, *shape[1:])
        self.decoder = decoder.build(self.latent_dim, out_shape)

    def draw(
        self, x: Float[Tensor, "B C H W"], y: Tensor | None = None, num_samples: int = 1, *, noise: Noise,
        stop_qz: bool = False,
    ) -> Draw:  # fmt: skip
        """Draw z from the posterior K times and score x under each.

        Args:
            x: images in [0, 1].
            y: labels; must be None, as every part here is unconditional.
            num_samples: K.
            noise: where the randomness comes from.
            stop_qz: hold the posterior's parameters constant in log q (sticking the landing).
        """
        qz = self.posterior(x, y)
        z, log_density = cast(Posterior, qz).rsample_and_log_prob((num_samples,), noise, stop=stop_qz)
        penalty = cast(Posterior, qz).penalty
        penalty = x.new_zeros(x.shape[0]) if penalty is None else penalty
        return Draw((z,), self.log_px(x, z, y), penalty, qz, self.prior(y), log_density)

    def prior(self, y: Tensor | None = None) -> Distribution:
        """p(z), of event shape (D,): scores latents and samples them."""
        _refuse_labels(y)
        if self._fixed_prior is not None:
            return self._fixed_prior
        codebook = getattr(self.posterior_head, "codebook", None)
        return self.prior_part(encode=self.posterior, codebook=codebook)

    @contextmanager
    def fixed_prior(self) -> Generator[None]:
        """Make the prior once for the block, in which no weight changes: one that is made of posteriors is dear."""
        with torch.no_grad():
            self._fixed_prior = self.prior()
        try:
            yield
        finally:
            self._fixed_prior = None

    def posterior(self, x: Float[Tensor, "B C H W"], y: Tensor | None = None) -> Distribution:
        """q(z|x), of batch shape (B,) and event shape (D,). Ask it for ``mean`` or ``rsample(...)`` by name."""
        _refuse_labels(y)
        return self.posterior_head(self.encoder(x))

    def likelihood(self, z: Float[Tensor, "*leading D"], y: Tensor | None = None) -> Distribution:
        """p(x|z), of event shape (C, H, W), for latents with any leading dimensions; ``mean`` is the image."""
        _refuse_labels(y)
        params: Tensor = self.decoder(z.reshape(-1, z.shape[-1]))
        return self.likelihood_head(params.reshape(*z.shape[:-1], *params.shape[1:]))

    def center(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The latent that stands for each image in pictures: a normal's mean, a code, a direction."""
        return cast(Posterior, self.posterior(x)).center

    @property
    def device(self) -> torch.device:
        """Where its weights are, and inputs belong."""
        return next(self.parameters()).device

    @property
    def space(self) -> Space:
        """Where latents lie."""
        return self.posterior_head.space

    def log_px(
        self, x: Float[Tensor, "B C H W"], z: Float[Tensor, "K B D"], y: Tensor | None = None
    ) -> Float[Tensor, "K B"]:
        """Score images under latents: log p(x|z) in nats, the work of a draw (``training.compiling`` fuses it)."""
        return self.likelihood(z, y).log_prob(x)

    def is_density(self, *, binary_data: bool) -> bool:
        """Whether log p(x|z) of such data is that of a normalised mass, or of a density that cannot diverge.

        A Bernoulli is that on binary data alone; a density on all others, as it can grow without bound where pixels are
        0 or 1; a mass over 256 levels on both.
        """
        support = self.likelihood_head.support
        return support == "bytes" or (support == "binary") == binary_data

    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters())


def _require_same_space(posterior: Spec, head: Head[Any], prior: Spec, part: Prior[Any]) -> None:
    if head.space != part.space:
        raise UsageError(
            f"--posterior {posterior.word} has latents in {SPACES[head.space]}, and --prior {prior.word} is over "
            f"{SPACES[part.space]}: choose {_PRIORS[head.space]}"
        )


SPACES = {"real": "R^D", "sphere": "the unit sphere", "categories": "categories", "codes": "a codebook's vectors"}
_PRIORS = {"real": "--prior standard-normal", "sphere": "--prior uniform-sphere",
           "categories": "--prior uniform-categories", "codes": "--prior uniform-codes"}  # fmt: skip


def _refuse_labels(y: Any) -> None:
    if y is not None:
        raise TypeError("this model is unconditional and was given labels: call it without y")
