"""Priors p(z). One distribution both scores and samples: what is drawn is what was trained against."""

from vaelab.priors.mixture import MixturePrior as MixturePrior
from vaelab.priors.mixture import NormalMixture as NormalMixture
from vaelab.priors.mixture import VampPrior as VampPrior
from vaelab.priors.normal import StandardNormal as StandardNormal
from vaelab.priors.normal import UnitNormal as UnitNormal
from vaelab.priors.prior import Prior as Prior
from vaelab.priors.prior import PriorDistribution as PriorDistribution
