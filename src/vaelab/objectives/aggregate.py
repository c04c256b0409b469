"""Objectives that look at the aggregate posterior: what the codes of all the data are, together and by dimension.

Shapes: B batch, D latent dimensions, N data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, final

from vaelab.objectives.objective import Objective, Parts, common_parts
from vaelab.specs.spec import option

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributions import Distribution, Normal
    from torch.nn import ModuleDict

    from vaelab.models import VAE, Batch
    from vaelab.runtime import Noise


@final
@dataclass(frozen=True)
class BetaTC(Objective):
    r"""The ELBO with its rate taken apart: minimise :math:`-E_q[\log p(x|z)] + \alpha I + \beta TC + \gamma D`.

    With the aggregate :math:`q(z) = \frac1N \sum_n q(z|x_n)`, the mean rate is the sum of the index-code mutual
    information :math:`I = E \log q(z|x) / q(z)`, the total correlation :math:`TC = E \log q(z) / \prod_d q(z_d)`, and
    the dimension-wise divergence :math:`D = E \log \prod_d q(z_d) / p(z)`; here on every draw, not only on average.

    Args:
        alpha, beta, gamma: the weights; all 1 give the ELBO with a sampled KL.
        weighting: how q(z) is estimated from a batch; see ``divergences.aggregate_log_prob``.

    Raises:
        TypeError: for a posterior that is not a product of normal dimensions.

    Note:
        The paper's ``stratified`` weights give one of the other examples what is left over; here each gets the same:
        the same mean, less variance. N is the size of the split that is looked at (a batch on its own is all there is),
        so that terms of splits of different sizes are not comparable. With a prior that is no product over dimensions
        D is still what is left of the rate, but no divergence. Each of several processes estimates from its own rows.

    Reference:
        Chen et al. (2018), Isolating Sources of Disentanglement in VAEs, eq. 4 and 5. https://arxiv.org/abs/1802.04942
    """

    word: ClassVar[str] = "tc"
    terms: ClassVar[tuple[str, ...]] = ("distortion", "rate", "mi", "tc", "dwkl")
    in_batch: ClassVar[bool] = True
    alpha: float = option(1.0, "weight on the mutual information of image and code")
    beta: float = option(6.0, "weight on the total correlation of the codes' dimensions")
    gamma: float = option(1.0, "weight on the divergence of each dimension from the prior")
    weighting: Literal["weighted", "stratified"] = option(
        "weighted", "estimate of q(z): minibatch-weighted, or the example's own term apart (stratified)"
    )

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion and penalty; ``mi``, ``tc`` and ``dwkl``, and ``rate``, their sum."""
        from vaelab.divergences import aggregate_log_prob

        draw = model.draw(batch.x, noise=noise)
        normal = _require_normal(draw.qz, "the total correlation")
        log_qz, log_qz_d = aggregate_log_prob(draw.z[0][0], normal, batch.total or len(batch.x), self.weighting)
        log_qzx, log_product = draw.require_log_qz("the mutual information")[0], log_qz_d.sum(0)
        return {
            "distortion": -draw.log_px.mean(0),
            "rate": log_qzx - draw.log_pz[0],
            "mi": log_qzx - log_qz,
            "tc": log_qz - log_product,
            "dwkl": log_product - draw.log_pz[0],
            "penalty": draw.penalty,
        }

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + alpha * mi + beta * tc + gamma * dwkl + penalty."""
        weighed = self.alpha * means["mi"] + self.beta * means["tc"] + self.gamma * means["dwkl"]
        return means["distortion"] + weighed + means["penalty"]


@final
@dataclass(frozen=True)
class DIP(Objective):
    r"""The ELBO, and the covariance of the codes led to I: :math:`\lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d
    \sum_i (C_{ii} - 1)^2` is added to its loss.

    C is the covariance of the posterior means, :math:`\mathrm{Cov}_x[\mu(x)]` (DIP-VAE-I), or of the codes themselves,
    :math:`E_x[\Sigma(x)] + \mathrm{Cov}_x[\mu(x)]` (DIP-VAE-II).

    Args:
        covariance: of the ``means`` or of the ``codes``.
        lambda_od: the weight off the diagonal.
        lambda_d: the weight on the diagonal.

    Raises:
        TypeError: for a posterior that is not a product of normal dimensions.

    Note:
        The authors take lambda_d = 10 lambda_od for the means, as the defaults do, and lambda_d = lambda_od for the
        codes. Covariances are those of a batch (each of several processes takes its own rows'); monitored is that of
        all the validation images.

    Reference:
        Kumar, Sattigeri & Balakrishnan (2018), Variational Inference of Disentangled Latent Concepts from Unlabeled
        Observations, eq. 6 and 7. https://arxiv.org/abs/1711.00848
    """

    word: ClassVar[str] = "dip"
    covariance: Literal["means", "codes"] = option("means", "of the posterior means (I), or of the codes (II)")
    lambda_od: float = option(10.0, "weight on covariances")
    lambda_d: float = option(100.0, "weight on the distance of variances from 1")

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, rate and penalty, and the first and the second ``moment``: (B, D) and (B, D, D)."""
        draw = model.draw(batch.x, noise=noise)
        normal = _require_normal(draw.qz, "the covariance of codes")
        second = normal.loc[:, :, None] * normal.loc[:, None, :]
        if self.covariance == "codes":
            second = second + normal.scale.square().diag_embed()
        return {**common_parts(draw), "first": normal.loc, "second": second}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + rate + penalty + what the covariance costs."""
        covariance = means["second"] - means["first"][:, None] * means["first"]
        variances = covariance.diagonal()
        off = covariance.square().sum() - variances.square().sum()
        cost = self.lambda_od * off + self.lambda_d * (variances - 1).square().sum()
        return means["distortion"] + means["rate"] + means["penalty"] + cost


def _require_normal(qz: Distribution, what: str) -> Normal:
    """The normal distribution of each dimension, of batch shape (B, D)."""
    from torch.distributions import Independent, Normal

    kind = type(qz).__name__
    base = cast(Any, qz).base_dist if isinstance(qz, Independent) else None
    if not isinstance(base, Normal):
        raise TypeError(f"{what} needs a posterior of independent normal dimensions, and {kind} is none: "
                        "--posterior diagonal-normal is one")  # fmt: skip
    return base
