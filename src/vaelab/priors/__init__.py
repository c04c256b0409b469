"""Priors p(z). One distribution both scores and samples: what is drawn is what was trained against."""

from vaelab.priors.discrete import UniformCategories as UniformCategories
from vaelab.priors.discrete import UniformCodes as UniformCodes
from vaelab.priors.flow import FlowPrior as FlowPrior
from vaelab.priors.mixture import MixturePrior as MixturePrior
from vaelab.priors.mixture import NormalMixture as NormalMixture
from vaelab.priors.mixture import VampPrior as VampPrior
from vaelab.priors.normal import StandardNormal as StandardNormal
from vaelab.priors.normal import UnitNormal as UnitNormal
from vaelab.priors.prior import Prior as Prior
from vaelab.priors.prior import PriorDistribution as PriorDistribution
from vaelab.priors.sphere import UniformSphere as UniformSphere
from vaelab.priors.twostage import SecondStage as SecondStage
from vaelab.priors.twostage import TwoStage as TwoStage
