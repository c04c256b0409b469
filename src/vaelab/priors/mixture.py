"""Mixtures of diagonal normals: learned, or made of the posteriors of learned images.

Shapes: M components, D latent dimensions, C H W image; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, constraints

from vaelab import specs
from vaelab.posteriors import Head, NormalPosterior, Space
from vaelab.priors.prior import Encode
from vaelab.runtime import Noise
from vaelab.specs import Shape


@final
class NormalMixture(Distribution):
    r"""A mixture of M diagonal normals, :math:`p(z) = \sum_m \pi_m N(z; \mu_m, \mathrm{diag}(\sigma_m^2))`.

    As ``torch.distributions.MixtureSameFamily``, but scored by two matrix products in place of an (N, M, D) tensor: the
    log-density of each component is linear in :math:`(z, z^2)`.

    Args:
        logits: (M,), of the weights, up to a constant.
        loc, log_scale: (M, D).

    Note:
        Multiplying out :math:`(z - \mu)^2` costs digits where scales are small beside the spread of the means: some
        1e-3 nats in fp32 at a ratio of 100. In float64 it is exact to 1e-9.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__(torch.Size(), loc.shape[-1:], validate_args=False)  # pyright: ignore[reportUnknownMemberType]
        self.log_weights = logits - logits.logsumexp(-1)
        self.loc, self.log_scale = loc, log_scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of latents (*leading, D), in nats."""
        # A product in bf16 would lose the difference of two squares.
        with torch.autocast(value.device.type, enabled=False):
            centre = self.loc.mean(0)
            z, mean, precision = value - centre, self.loc - centre, torch.exp(-2 * self.log_scale)
            constant = self.log_weights - self.log_scale.sum(-1) - 0.5 * (mean.square() * precision).sum(-1)
            flat = z.reshape(-1, z.shape[-1])
            by_component = torch.cat([flat, flat.square()], 1) @ torch.cat([mean * precision, -0.5 * precision], 1).mT
            log_p = torch.logsumexp(by_component + constant, -1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
            return log_p.reshape(z.shape[:-1])

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.log_weights.exp() @ self.loc

    @property
    def variance(self) -> Tensor:
        """(D,)."""
        second = self.log_weights.exp() @ (self.loc.square() + torch.exp(2 * self.log_scale))
        return second - self.mean.square()

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        with torch.no_grad():
            component = Categorical(logits=self.log_weights, validate_args=False).sample(sample_shape)
            loc, scale = self.loc[component], self.log_scale[component].exp()
            return loc + scale * torch.randn_like(loc)

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D); differentiable in means and scales, not in the weights."""
        share = self.log_weights.exp().cumsum(0)
        u = noise.uniform("component", (count,)).to(share) * share[-1]
        component = torch.searchsorted(share.detach(), u).clamp(max=len(share) - 1)
        eps = noise.normal("prior", (count, *self.event_shape))
        return self.loc[component] + self.log_scale[component].exp() * eps


@final
class MixturePrior(nn.Module):
    r"""A learned mixture of M diagonal normals.

    Args:
        spec: the configuration.
        head: the posterior's, for D.
        shape: of an image; unused.

    Reference:
        Dilokthanakul et al. (2017), Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders.
        https://arxiv.org/abs/1611.02648 (a mixture in latent space; here without its second layer)
    """

    space: Space = "real"
    is_encoded = False

    def __init__(self, spec: specs.Mixture, head: Head, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        self.logits = nn.Parameter(torch.zeros(spec.num_components))
        self.loc = nn.Parameter(torch.randn(spec.num_components, head.latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(spec.num_components, head.latent_dim))

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,)."""
        return NormalMixture(self.logits, self.loc, self.log_scale)


@final
class VampPrior(nn.Module):
    r"""The variational mixture of posteriors: :math:`p(z) = \frac1M \sum_m q(z|u_m)`, with learned pseudo-inputs u.

    Args:
        spec: the configuration.
        head: the posterior's, for its space.
        shape: (C, H, W) of an image.

    Note:
        Pseudo-inputs start at training images (``start_at``), as the authors' option of that name does, and are kept in
        [0, 1] by clamping, as in their code.

    Reference:
        Tomczak & Welling (2018), VAE with a VampPrior, eq. 9. https://arxiv.org/abs/1705.07120
    """

    space: Space = "real"
    is_encoded = True

    def __init__(self, spec: specs.VampPrior, head: Head, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        self.pseudo_inputs = nn.Parameter(torch.rand(spec.num_components, *shape))

    def start_at(self, images: Tensor) -> None:
        """Set the pseudo-inputs to these images (M', C, H, W), in turn if they are fewer than M."""
        rows = torch.arange(len(self.pseudo_inputs), device=images.device) % len(images)
        with torch.no_grad():
            self.pseudo_inputs.copy_(images[rows])

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,): a mixture of what ``encode`` makes of the pseudo-inputs."""
        assert encode is not None
        components = encode(self.pseudo_inputs.clamp(0, 1))
        if not isinstance(components, NormalPosterior):
            raise TypeError(f"--prior vamp is made of normal posteriors, not of {type(components).__name__}: "
                            "--posterior diagonal-normal has them")  # fmt: skip
        loc, log_scale = components.loc, cast(Tensor, components.log_scale)
        return NormalMixture(loc.new_zeros(len(loc)), loc, log_scale)
