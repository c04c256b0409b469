"""Posteriors that a normalising flow makes of a diagonal normal.

Shapes: K samples, B batch, F features, D latent dimensions, T transforms, H numbers of context.
"""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.flows import Conditioned, Flow, MaskedFlow, OneWay, Planar, Radial
from vaelab.posteriors.normal import NormalPosterior
from vaelab.posteriors.posterior import Head, LogDensity
from vaelab.runtime import Noise


@final
class FlowPosterior(Unchecked):
    r"""The law of :math:`z = f(z_0)` for a diagonal normal :math:`z_0` and an invertible f.

    :math:`\log q(z|x) = \log q_0(z_0|x) - \log |\det \partial f / \partial z_0|`, in nats. Neither mean nor variance is
    known.

    Args:
        base: the law of :math:`z_0`, (B, D).
        flow: f.
    """

    has_rsample = True
    penalty: Tensor | None = None

    def __init__(self, base: NormalPosterior, flow: Flow) -> None:
        super().__init__(base.batch_shape, base.event_shape)
        self.base, self.flow = base, flow

    @property
    def mean(self) -> Tensor:
        """Raises ``NotImplementedError``: it is not known."""
        raise NotImplementedError("the mean of a flow's posterior is not known: center is a typical point of it")

    @property
    def center(self) -> Tensor:
        """Where the flow takes the base's mean: a typical point of q, not its mean, which is not known."""
        return self.flow(self.base.loc)[0]

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, B, D) by torch's global generator."""
        return self.flow(self.base.rsample(sample_shape))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of latents (*leading, D), in nats.

        Raises:
            NotImplementedError: for flows without an inverse (planar, radial).
        """
        z0, log_det = self.flow.inverse(value)
        return self.base.log_prob(z0) - log_det

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity]:
        r"""Map a draw of the base, :math:`z = f(z_0)`; the log-density needs no inverse.

        With ``stop`` it does: q with constant parameters is asked for the density of z, which is mapped back.

        Raises:
            TypeError: with ``stop``, for flows without an inverse (planar, radial).
        """
        z0, log_base = self.base.rsample_and_log_prob(shape, noise)
        z, log_det = self.flow(z0)
        if not stop:
            return z, lambda: log_base() - log_det
        if isinstance(self.flow, OneWay):
            kind = type(self.flow).__name__.lower()
            raise TypeError(
                f"a gradient through the samples alone needs q's density at a given z, and a {kind} flow has no "
                "inverse to compute it by: choose --objective iwae or elbo, or --posterior iaf"
            )
        constant = NormalPosterior(self.base.loc.detach(), self.base.log_scale.detach())
        held = FlowPosterior(constant, self.flow.held())
        return z, lambda: held.log_prob(z)


@final
class PlanarFlow(Head[specs.PlanarFlow]):
    r"""Head of an encoder: a base normal, and the parameters of transforms :math:`f(z) = z + \hat u \tanh(w^T z + b)`.

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, algorithm 1.
        https://arxiv.org/abs/1505.05770
    """

    def __init__(self, spec: specs.PlanarFlow, in_features: int) -> None:
        super().__init__(spec, spec.latent_dim)
        self.base_and_flow = nn.Linear(
            in_features, 2 * spec.latent_dim + spec.num_transforms * (2 * spec.latent_dim + 1)
        )

    def forward(self, features: Float[Tensor, "B F"]) -> FlowPosterior:
        """The posterior of each example."""
        dim, count = self.latent_dim, self.spec.num_transforms
        numbers = self.base_and_flow(features).float()
        loc, log_scale, u, w, b = numbers.split([dim, dim, count * dim, count * dim, count], -1)
        flow = Planar(u.unflatten(-1, (count, dim)), w.unflatten(-1, (count, dim)), b)
        return FlowPosterior(NormalPosterior(loc, log_scale), flow)


@final
class RadialFlow(Head[specs.RadialFlow]):
    r"""Head of an encoder: a base normal, and of transforms :math:`f(z) = z + \beta (z - c) / (\alpha + |z - c|)`.

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, algorithm 1.
        https://arxiv.org/abs/1505.05770
    """

    def __init__(self, spec: specs.RadialFlow, in_features: int) -> None:
        super().__init__(spec, spec.latent_dim)
        self.base_and_flow = nn.Linear(in_features, 2 * spec.latent_dim + spec.num_transforms * (spec.latent_dim + 2))

    def forward(self, features: Float[Tensor, "B F"]) -> FlowPosterior:
        """The posterior of each example."""
        dim, count = self.latent_dim, self.spec.num_transforms
        numbers = self.base_and_flow(features).float()
        loc, log_scale, centre, log_alpha, b = numbers.split([dim, dim, count * dim, count, count], -1)
        return FlowPosterior(NormalPosterior(loc, log_scale), Radial(centre.unflatten(-1, (count, dim)), log_alpha, b))


@final
class IAF(Head[specs.IAF]):
    r"""Head of an encoder: a base normal, and a context h(x) of inverse autoregressive transforms, :math:`z_i =
    \sigma_i(z_{0,<i}, h)\, z_{0,i} + \mu_i(z_{0,<i}, h)`.

    The order of the dimensions is reversed from one transform to the next. A draw takes one pass of each network; the
    density of another z takes D, as do gradients through the samples alone (``stl``, ``dreg``).

    Note:
        The paper's gate, :math:`z = \sigma z_0 + (1 - \sigma) m` with :math:`\sigma` below 1, is here zuko's affine
        transform with :math:`|\log \sigma| < \log 1000`; h has as many numbers as the widest hidden layer.

    Reference:
        Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow, algorithm 1.
        https://arxiv.org/abs/1606.04934
    """

    def __init__(self, spec: specs.IAF, in_features: int) -> None:
        super().__init__(spec, spec.latent_dim)
        self.context_dim = max(spec.hidden_dims, default=spec.latent_dim)
        self.base_and_context = nn.Linear(in_features, 2 * spec.latent_dim + self.context_dim)
        self.flow = MaskedFlow(spec.latent_dim, self.context_dim, spec.num_transforms, spec.hidden_dims)

    def forward(self, features: Float[Tensor, "B F"]) -> FlowPosterior:
        """The posterior of each example."""
        numbers = self.base_and_context(features).float()
        loc, log_scale, context = numbers.split([self.latent_dim, self.latent_dim, self.context_dim], -1)
        return FlowPosterior(NormalPosterior(loc, log_scale), Conditioned(self.flow, context))
