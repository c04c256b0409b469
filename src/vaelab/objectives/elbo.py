"""The evidence lower bound, and ways to weigh its two terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from vaelab import schedules
from vaelab.errors import UsageError
from vaelab.objectives.objective import Number, Objective, Parts, common_parts
from vaelab.specs.spec import option, positive

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch
    from vaelab.runtime import Noise


@final
@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound, with a weight on the rate: minimise :math:`-E_q[\log p(x|z)] + \beta D_{KL}(q \| p)`.

    With ``beta = 1`` its negative bounds log p(x) from below. With another it is a trade-off between distortion and
    rate (beta-VAE), not a bound; ``evaluate`` then prints both.

    Args:
        beta: the weight on the rate.
        kl_warmup_epochs: the weight rises linearly from 0 to ``beta`` over so many epochs.

    Reference:
        Kingma & Welling (2014), eq. 10. https://arxiv.org/abs/1312.6114
        Higgins et al. (2017), beta-VAE. https://openreview.net/forum?id=Sy2fzU9gl
        Bowman et al. (2016), section 3.1 (annealing). https://arxiv.org/abs/1511.06349
    """

    word: ClassVar[str] = "elbo"
    beta: float = option(1.0, "weight on the rate (the KL)")
    kl_warmup_epochs: float = option(0.0, "epochs over which that weight rises from 0")

    @property
    def annealing_epochs(self) -> float:
        """Epochs until the weight reaches ``beta``."""
        return self.kl_warmup_epochs

    def at(self, epoch: float) -> ELBO:
        """The ELBO with the weight that holds at ``epoch``."""
        beta = schedules.linear(0.0, self.beta, self.kl_warmup_epochs)(epoch)
        return replace(self, beta=beta, kl_warmup_epochs=0.0)

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + beta * rate + penalty."""
        return self.weigh(means["distortion"], means["rate"]) + means["penalty"]

    def weigh(self, distortion: Number, rate: Number) -> Number:
        """Distortion + beta * rate."""
        return distortion + self.beta * rate


@final
@dataclass(frozen=True)
class Capacity(Objective):
    r"""Hold the rate at a capacity that grows: minimise :math:`-E_q[\log p(x|z)] + \gamma |E_x D_{KL}(q \| p) - C|`.

    Args:
        gamma: the weight :math:`\gamma`.
        capacity: C at the end, in nats.
        capacity_epochs: C rises linearly from 0 over so many epochs.

    Note:
        The mean over the batch stands inside the absolute value, as in the authors' figure of C against the mean KL.
        Each of several processes takes the mean of its own rows.

    Reference:
        Burgess et al. (2018), Understanding disentangling in beta-VAE, eq. 8. https://arxiv.org/abs/1804.03599
    """

    word: ClassVar[str] = "capacity"
    gamma: float = option(1000.0, "weight on the distance between rate and capacity")
    capacity: float = option(25.0, "what the rate is led to, in nats")
    capacity_epochs: float = option(10.0, "epochs over which the capacity rises from 0")

    @property
    def annealing_epochs(self) -> float:
        """Epochs until the capacity is reached."""
        return self.capacity_epochs

    def at(self, epoch: float) -> Capacity:
        """The objective with the capacity that holds at ``epoch``."""
        capacity = schedules.linear(0.0, self.capacity, self.capacity_epochs)(epoch)
        return replace(self, capacity=capacity, capacity_epochs=0.0)

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + gamma |rate - C| + penalty."""
        return means["distortion"] + self.gamma * (means["rate"] - self.capacity).abs() + means["penalty"]


@final
@dataclass(frozen=True)
class FreeBits(Objective):
    r"""Let each dimension have some rate for nothing: :math:`-E_q[\log p(x|z)] + \sum_d \max(\lambda, E_x D_d)`.

    A dimension whose KL, on average over the batch, is below lambda gets no gradient from it, so that none is given up
    early in the training. Each of several processes takes the average of its own rows.

    Args:
        free_nats: lambda, in nats for each dimension (the paper counts bits in name, nats in its formula).

    Raises:
        TypeError: for a posterior or a prior whose dimensions are not independent, or whose KL is not known.

    Reference:
        Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow, eq. 15.
        https://arxiv.org/abs/1606.04934
    """

    word: ClassVar[str] = "free-bits"
    free_nats: float = option(0.1, "rate that each dimension has for nothing, in nats")

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, rate and penalty, and ``rates`` (B, D), of each dimension."""
        from vaelab.divergences import kl_of_dimensions

        draw = model.draw(batch.x, noise=noise)
        rates = kl_of_dimensions(draw.qz, draw.pz)
        if rates is None:
            raise TypeError(
                "free bits are counted for each dimension, and this model has no KL of each: they need --posterior "
                "diagonal-normal and --prior standard-normal"
            )
        return {**common_parts(draw), "rates": rates}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + sum over dimensions of max(lambda, rate) + penalty."""
        return means["distortion"] + means["rates"].clamp(min=self.free_nats).sum() + means["penalty"]


@final
@dataclass(frozen=True)
class BalancedELBO(Objective):
    r"""The ELBO whose KL moves prior and posterior at different speeds.

    :math:`D = \alpha D_{KL}(\mathrm{sg}(q) \| p) + (1 - \alpha) D_{KL}(q \| \mathrm{sg}(p))`, with sg the stopped
    gradient: with alpha above a half a learned prior goes to the posteriors faster than they come to it, and the
    encoder is not held back by a prior that is still poor. The value is that of the ELBO.

    Args:
        balance: alpha.

    Raises:
        UsageError: for a prior that learns nothing.

    Reference:
        Hafner et al. (2021), Mastering Atari with Discrete World Models, algorithm 2. https://arxiv.org/abs/2010.02193
    """

    word: ClassVar[str] = "balanced-elbo"
    balance: float = positive(
        0.8, "share of the KL's gradient that goes to the prior; the rest goes to the posterior", at_most=1
    )

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """One group of all the model's parameters, some of them the prior's."""
        if not list(model.prior_part.parameters()):
            raise UsageError("--objective balanced-elbo balances what prior and posterior learn, and this prior learns "
                             "nothing: --prior mixture, vamp or flow do")  # fmt: skip
        return super().groups(model, networks)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, rate and penalty; the rate is the sample estimate."""
        from vaelab.divergences import scale_gradient

        draw = model.draw(batch.x, noise=noise)
        alpha = self.balance
        # The prior's own parameters get alpha, and z, on its way through the prior, 1 - alpha in all.
        log_pz = scale_gradient(draw.pz.log_prob(scale_gradient(draw.z[0], (1 - alpha) / alpha)), alpha)
        rate = (scale_gradient(draw.require_log_qz("the KL"), 1 - alpha) - log_pz).mean(0)
        return {"distortion": -draw.log_px.mean(0), "rate": rate, "penalty": draw.penalty}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + rate + penalty."""
        return means["distortion"] + means["rate"] + means["penalty"]
