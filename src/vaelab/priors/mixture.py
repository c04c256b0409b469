"""Mixtures of normals: learned, or made of the posteriors of learned images.

Shapes: M components, D latent dimensions, C H W image; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.posteriors import Head, NormalPosterior
from vaelab.priors.prior import Encode, Prior
from vaelab.runtime import Noise
from vaelab.specs import Shape


@final
class NormalMixture(Unchecked):
    r"""A mixture of M normals, :math:`p(z) = \sum_m \pi_m N(z; \mu_m, (P_m^T P_m)^{-1})`.

    As ``torch.distributions.MixtureSameFamily``, but diagonal components are scored by two matrix products in place of
    an (N, M, D) tensor: the log-density of each is linear in :math:`(z, z^2)`.

    Args:
        logits: (M,), of the weights, up to a constant.
        loc: (M, D).
        log_scale: (M, D), minus the logarithm of the diagonal of :math:`P_m`, which is lower triangular.
        lower: (M, D, D), of which what is below the diagonal is that of :math:`P_m`; None: nothing, the components'
            dimensions are independent and exp(log_scale) their standard deviations.

    Note:
        Multiplying out :math:`(z - \mu)^2` costs digits where scales are small beside the spread of the means: some
        1e-3 nats in fp32 at a ratio of 100. In float64 it is exact to 1e-9. Full components are scored without it.
    """

    def __init__(self, logits: Tensor, loc: Tensor, log_scale: Tensor, lower: Tensor | None = None) -> None:
        super().__init__(torch.Size(), loc.shape[-1:])
        self.log_weights = logits - logits.logsumexp(-1)
        self.loc, self.log_scale = loc, log_scale
        # Factors of inverse covariances: scores, which are asked for far more often than draws, are products.
        self.whitening = None if lower is None else lower.tril(-1) + torch.diag_embed(torch.exp(-log_scale))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of latents (*leading, D), in nats."""
        # A product in bf16 would lose the difference of two squares.
        with torch.autocast(value.device.type, enabled=False):
            flat = value.reshape(-1, value.shape[-1])
            squares = self._diagonal(flat) if self.whitening is None else self._full(flat, self.whitening)
            constant = self.log_weights - self.log_scale.sum(-1)
            log_p = torch.logsumexp(squares + constant, -1) - 0.5 * value.shape[-1] * math.log(2 * math.pi)
            return log_p.reshape(value.shape[:-1])

    def _diagonal(self, flat: Tensor) -> Tensor:
        """Minus half the squared distance of latents (N, D) from each mean, in its scales, (N, M)."""
        centre = self.loc.mean(0)
        z, mean, precision = flat - centre, self.loc - centre, torch.exp(-2 * self.log_scale)
        constant = -0.5 * (mean.square() * precision).sum(-1)
        return torch.cat([z, z.square()], 1) @ torch.cat([mean * precision, -0.5 * precision], 1).mT + constant

    def _full(self, flat: Tensor, whitening: Tensor) -> Tensor:
        r"""The same for full components: minus half the square of :math:`P_m (z - \mu_m)`."""
        return -0.5 * ((flat - self.loc[:, None]) @ whitening.mT).square().sum(-1).mT

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        with torch.no_grad():
            component = Categorical(logits=self.log_weights, validate_args=False).sample(sample_shape)
            return self._placed(component, torch.randn_like(self.loc[component]))

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D); differentiable in means and scales, not in the weights."""
        share = self.log_weights.exp().cumsum(0)
        u = noise.uniform("component", (count,)).to(share) * share[-1]
        component = torch.searchsorted(share.detach(), u).clamp(max=len(share) - 1)
        return self._placed(component, noise.normal("prior", (count, *self.event_shape)))

    def _placed(self, component: Tensor, eps: Tensor) -> Tensor:
        """Standard normal numbers (*leading, D), as draws of these components (*leading)."""
        loc = self.loc[component]
        if self.whitening is None:
            return loc + self.log_scale[component].exp() * eps
        with torch.autocast(eps.device.type, enabled=False):
            return loc + (_inverse(self.whitening)[component] @ eps[..., None])[..., 0]


@final
class MixturePrior(Prior[specs.Mixture]):
    r"""A learned mixture :math:`p(z) = \sum_m \pi_m N(z; \mu_m, \Sigma_m)`, with diagonal or full covariances.

    Reference:
        Dilokthanakul et al. (2017), Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders.
        https://arxiv.org/abs/1611.02648 (a mixture in latent space; here without its second layer)
        Ghosh et al. (2020), From Variational to Deterministic Autoencoders, section 4 (full covariances, fitted after
        the training). https://arxiv.org/abs/1903.12436
    """

    def __init__(self, spec: specs.Mixture, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        size = (spec.num_components, head.latent_dim)
        self.logits = nn.Parameter(torch.zeros(spec.num_components))
        self.loc = nn.Parameter(torch.randn(size))
        self.log_scale = nn.Parameter(torch.zeros(size))
        full = spec.covariance == "full"
        self.lower = nn.Parameter(torch.zeros(*size, head.latent_dim)) if full else None

    def start_at(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the mixture with these weights (M,), means (M, D) and Cholesky factors of covariances (M, D, D)."""
        log_scale = torch.diagonal(scale_tril, dim1=-2, dim2=-1).log()
        pairs = [(self.logits, weights.log()), (self.loc, loc), (self.log_scale, log_scale)]
        if self.lower is not None:
            pairs.append((self.lower, _inverse(scale_tril).tril(-1)))
        with torch.no_grad():
            for parameter, values in pairs:
                parameter.copy_(values)

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,)."""
        return NormalMixture(self.logits, self.loc, self.log_scale, self.lower)


@final
class VampPrior(Prior[specs.VampPrior]):
    r"""The variational mixture of posteriors: :math:`p(z) = \frac1M \sum_m q(z|u_m)`, with learned pseudo-inputs u.

    Note:
        Pseudo-inputs start at training images (``start_at``), as the authors' option of that name does, and are kept in
        [0, 1] by clamping, as in their code.

    Reference:
        Tomczak & Welling (2018), VAE with a VampPrior, eq. 9. https://arxiv.org/abs/1705.07120
    """

    is_encoded = True

    def __init__(self, spec: specs.VampPrior, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
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
        loc, log_scale = components.loc, components.log_scale
        return NormalMixture(loc.new_zeros(len(loc)), loc, log_scale)


def _inverse(triangular: Tensor) -> Tensor:
    """Of lower triangular matrices (M, D, D)."""
    identity = torch.eye(triangular.shape[-1], dtype=triangular.dtype, device=triangular.device)
    solve = cast(Any, torch.linalg.solve_triangular)  # pyright: ignore[reportUnknownMemberType]
    return solve(triangular, identity.expand_as(triangular), upper=False)
