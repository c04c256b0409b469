r"""A second, small VAE on the latents of the first, as its prior.

Shapes: B latents, D latent dimensions (of both stages), K samples.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from vaelab import specs
from vaelab.distribution import NoDensityError, Unchecked
from vaelab.divergences import kl_to_standard_normal, log_mean_exp
from vaelab.posteriors import Head, NormalPosterior
from vaelab.priors.prior import Encode, StandardisedPrior
from vaelab.runtime import Noise
from vaelab.specs import Shape

_FIRST_GAMMA = 0.1  # of the spread of latents


@final
class SecondStage(Unchecked):
    r"""Latents that a second VAE makes: :math:`u \sim N(0, I)`, :math:`z \sim N(f(u), \gamma^2 I)`.

    Their density :math:`p(z) = \int N(z; f(u), \gamma^2 I)\, N(u; 0, I)\, du` has no closed form: it can be sampled
    and not scored. ``TwoStage.log_bound`` bounds it from below.

    Args:
        part: the second VAE.
    """

    def __init__(self, part: TwoStage) -> None:
        super().__init__(torch.Size(), part.loc.shape)
        self._part = part

    def log_prob(self, value: Tensor) -> Tensor:
        """Unknown."""
        raise NoDensityError(
            "log p(z) is undefined for this model, and so its KL and every likelihood: its prior two-stage can be "
            "sampled and has no density"
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        with torch.no_grad():
            like = self._part.loc.expand(*sample_shape, *self.event_shape)
            return self._part.decoded(torch.randn_like(like), torch.randn_like(like))

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D), differentiably; streams ``"prior"`` for u and ``"second stage"`` for z given u."""
        shape = (count, *self.event_shape)
        return self._part.decoded(noise.normal("prior", shape), noise.normal("second stage", shape))


@final
class TwoStage(StandardisedPrior[specs.TwoStage]):
    r"""A VAE over latents: :math:`q(u|z)` diagonal normal, :math:`p(z|u) = N(f(u), \gamma^2 I)` with one learned gamma.

    It is fitted to a trained model's codes, by ``vaelab refit``, and not trained with it.

    The first VAE's latents fill the space and follow no normal distribution; the second, whose latents have as many
    dimensions as its data, learns theirs. It sees latents standardised by ``loc`` and ``scale``.

    Note:
        The authors' networks have three hidden layers of 1024 and hand their input on to the last layer, as ours do;
        ours have two of 512. Their gamma starts at 1, the spread of standardised latents, where a second stage that
        encodes nothing is a stationary point: on latents around a ring, ours never left it. It starts at 0.1.

    Reference:
        Dai & Wipf (2019), Diagnosing and Enhancing VAE Models, section 4. https://arxiv.org/abs/1903.05789
    """

    def __init__(self, spec: specs.TwoStage, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        dim = head.latent_dim
        self.encoder = _Network(dim, spec.stage_hidden_dims, 2 * dim)
        self.decoder = _Network(dim, spec.stage_hidden_dims, dim)
        self.log_gamma = nn.Parameter(torch.tensor(math.log(_FIRST_GAMMA)))

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,): it can be sampled and not scored."""
        return SecondStage(self)

    def decoded(self, u: Tensor, eps: Tensor) -> Tensor:
        """Latents of the first stage (*leading, D) from those of the second and standard normal numbers."""
        return self.loc + self.scale * (self.decoder(u).float() + self.log_gamma.exp() * eps)

    def elbo(self, z: Tensor, noise: Noise) -> Tensor:
        """A lower bound (B,) on log p(z) of latents (B, D), in nats, by one draw of u: what it is trained by."""
        standard, qu = self._encoded(z)
        u, _ = qu.rsample_and_log_prob((1,), noise)
        return self._log_pz_given(u, standard)[0] - kl_to_standard_normal(qu.loc, qu.log_scale)

    def log_bound(self, z: Tensor, num_samples: int, noise: Noise) -> Tensor:
        """A closer lower bound (B,), the importance-weighted one of K draws of u for each latent, in nats."""
        standard, qu = self._encoded(z)
        u, log_density = qu.rsample_and_log_prob((num_samples,), noise)
        log_pu = Independent(Normal(torch.zeros_like(u), 1.0, validate_args=False), 1, validate_args=False).log_prob(u)
        return log_mean_exp(self._log_pz_given(u, standard) + log_pu - log_density())

    def _encoded(self, z: Tensor) -> tuple[Tensor, NormalPosterior]:
        standard = (z - self.loc) / self.scale
        return standard, NormalPosterior(*self.encoder(standard).float().chunk(2, -1))

    def _log_pz_given(self, u: Tensor, standard: Tensor) -> Tensor:
        """The log-density (K, B) of standardised latents (B, D) given u, as one of the latents as they are."""
        away = (standard - self.decoder(u).float()) / self.log_gamma.exp()
        constant = self.log_gamma + 0.5 * math.log(2 * math.pi)
        return -(0.5 * away.square() + constant).sum(-1) - self.scale.log().sum()


@final
class _Network(nn.Module):
    """Linear layers with ReLU, the last of which also sees the input."""

    def __init__(self, dim: int, hidden_dims: tuple[int, ...], out: int) -> None:
        super().__init__()
        pairs = itertools.pairwise((dim, *hidden_dims))
        self.hidden = nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())))
        self.last = nn.Linear((hidden_dims[-1] if hidden_dims else 0) + dim, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (*leading, D) to (*leading, out)."""
        inputs = [cast(Tensor, self.hidden(x)), x] if len(self.hidden) else [x]
        return self.last(torch.cat(inputs, -1))
