"""Learning without a gradient through samples: each side from what the other one dreams up.

Shapes: B batch, D latent dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast, final

from vaelab.objectives.objective import Losses, Objective, Parts, means_of, two_sides

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributions import Distribution
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch
    from vaelab.posteriors import Posterior
    from vaelab.priors import PriorDistribution
    from vaelab.runtime import Noise


@dataclass(frozen=True)
class Scored(Objective):
    """A rule whose encoder learns to score codes that it did not draw.

    Monitored is the negative ELBO with a sampled KL.
    """

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Encoder and decoder."""
        return two_sides(model, self.word)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, and the sample estimate of the rate."""
        draw = model.draw(batch.x, noise=noise)
        rate = self.score(draw.qz, draw.z[0][0]) - draw.log_pz[0]
        return {"distortion": -draw.log_px.mean(0), "rate": rate}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + rate."""
        return means["distortion"] + means["rate"]

    def score(self, qz: Distribution, z: Tensor) -> Tensor:
        """Log q(z|x) (B,) of given codes (B, D), in nats.

        Raises:
            TypeError: if that is not known of codes which q did not draw.
        """
        if cast("Posterior", qz).penalty is None:  # else a code is chosen, not drawn, and its mass has no gradient
            with contextlib.suppress(NotImplementedError):
                return qz.log_prob(z)
        raise TypeError(f"{self.word} scores codes that the encoder did not draw, and {type(qz).__name__} cannot: "
                        "--posterior diagonal-normal can")  # fmt: skip


@final
@dataclass(frozen=True)
class WakeSleep(Scored):
    r"""Wake: :math:`\max_\theta E_{q(z|x)} \log p_\theta(x, z)` on data; sleep: :math:`\max_\phi E_{p(x, z)} \log
    q_\phi(z|x)` on images that the model itself draws.

    The decoder follows the bound; the encoder follows :math:`D_{KL}(p(z|x) \| q(z|x))`, the other way round than in the
    bound, and on dreams in place of data. Together they descend no single loss. Monitored is the negative ELBO with a
    sampled KL, which is what the wake phase lowers.

    Raises:
        TypeError: for a posterior that cannot score codes other than its own.
        UsageError: for a prior that is made of the encoder.

    Note:
        The original nets are layers of binary units; here it is done for any q and p, as in the comparison of Kingma &
        Welling. Both sides step at once. Dreams are drawn by torch's global generator, which is seeded for each step.

    Reference:
        Hinton, Dayan, Frey & Neal (1995), The wake-sleep algorithm for unsupervised neural networks. Science 268.
        https://doi.org/10.1126/science.7761831
        Kingma & Welling (2014), section 5 (the comparison). https://arxiv.org/abs/1312.6114
    """

    word: ClassVar[str] = "wake-sleep"
    samples: ClassVar[bool] = True

    def losses(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """Wake and sleep, of the same weights."""
        from torch import no_grad

        means = means_of(self.parts(model, networks, batch, noise))
        loss = self.loss(means)
        with no_grad():
            z = cast("PriorDistribution", model.prior()).rsample_from(noise, len(batch.x))
            x = model.likelihood(z).sample()
        # Neither z nor q(z|x) depends on the decoder: its gradient of the bound is that of log p(x, z).
        yield ("decoder", "encoder"), (loss, -self.score(model.posterior(x), z).mean())
        return self.record(loss, means)
