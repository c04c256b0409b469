"""Objectives that match the aggregate posterior with the prior by their samples.

Shapes: B batch, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast, final

from vaelab.objectives.objective import Objective, Parts, require_fixed_prior
from vaelab.specs.spec import option, positive

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch
    from vaelab.priors import PriorDistribution
    from vaelab.runtime import Noise


@final
@dataclass(frozen=True)
class MMD(Objective):
    r"""Match the codes of all the data, not of each, with the prior: minimise :math:`-E_q[\log p(x|z)] + \lambda
    \mathrm{MMD}^2(q(z), p(z))`, and the rate with a weight of its own if it is to count.

    Without a rate it is WAE-MMD, for deterministic encoders too, and the MMD-VAE; with one the InfoVAE.

    Args:
        mmd_weight: lambda; :math:`\alpha + \lambda - 1` in the letters of InfoVAE.
        rate_weight: :math:`1 - \alpha` in the letters of InfoVAE; None: no rate is asked for.
        kernel: ``imq``, a sum of inverse multiquadratics, or ``rbf``; see ``divergences.similarity``.

    Raises:
        TypeError: for a posterior without a density, if the rate has a weight.
        UsageError: for a prior that learns, if the rate has none: samples say nothing of a mixture's weights.

    Note:
        The estimate is unbiased within a batch, each code against all other codes and against as many from the prior.
        WAE's cost is a squared error; here it is the model's distortion, in nats, by which its weight is to be judged.

    Reference:
        Zhao, Song & Ermon (2019), InfoVAE, eq. 6 and section 3.2. https://arxiv.org/abs/1706.02262
        Tolstikhin et al. (2018), Wasserstein Auto-Encoders, algorithm 2. https://arxiv.org/abs/1711.01558
    """

    word: ClassVar[str] = "mmd"
    terms: ClassVar[tuple[str, ...]] = ("distortion", "mmd")
    in_batch: ClassVar[bool] = True
    mmd_weight: float = option(10.0, "weight on the discrepancy between codes and prior")
    rate_weight: float | None = positive(None, "weight on the rate; default: there is no rate")
    kernel: Literal["imq", "rbf"] = option("imq", "by which codes are compared: inverse multiquadratic, or Gaussian")

    @property
    def beta(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight on the rate, for records."""
        return self.rate_weight or 0.0

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """One group of all the model's parameters."""
        if self.rate_weight is None:
            require_fixed_prior(model, self.word)
        return super().groups(model, networks)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, penalty and ``mmd``; the rate if it has a weight."""
        from vaelab.divergences import mmd_of_rows

        draw = model.draw(batch.x, noise=noise)
        codes = draw.z[0][0]
        wanted = cast("PriorDistribution", draw.pz).rsample_from(noise, len(codes))
        parts = {
            "distortion": -draw.log_px.mean(0),
            "mmd": mmd_of_rows(codes, wanted, self.kernel),
            "penalty": draw.penalty,
        }
        return parts if self.rate_weight is None else {**parts, "rate": draw.kl.sum(0)}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + lambda * mmd + penalty, and the weighed rate."""
        loss = means["distortion"] + self.mmd_weight * means["mmd"] + means["penalty"]
        return loss if self.rate_weight is None else loss + self.rate_weight * means["rate"]
