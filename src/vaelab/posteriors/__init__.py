"""Approximate posteriors q(z|x): from an encoder's features to a distribution over the latents."""

from vaelab.posteriors.categorical import CategoricalPosterior as CategoricalPosterior
from vaelab.posteriors.categorical import GumbelSoftmax as GumbelSoftmax
from vaelab.posteriors.codes import CodePosterior as CodePosterior
from vaelab.posteriors.codes import VectorQuantized as VectorQuantized
from vaelab.posteriors.covariance import FullNormal as FullNormal
from vaelab.posteriors.covariance import FullNormalPosterior as FullNormalPosterior
from vaelab.posteriors.deterministic import Deterministic as Deterministic
from vaelab.posteriors.deterministic import PointPosterior as PointPosterior
from vaelab.posteriors.flow import IAF as IAF
from vaelab.posteriors.flow import FlowPosterior as FlowPosterior
from vaelab.posteriors.flow import PlanarFlow as PlanarFlow
from vaelab.posteriors.flow import RadialFlow as RadialFlow
from vaelab.posteriors.normal import DiagonalNormal as DiagonalNormal
from vaelab.posteriors.normal import NormalPosterior as NormalPosterior
from vaelab.posteriors.posterior import Head as Head
from vaelab.posteriors.posterior import LogDensity as LogDensity
from vaelab.posteriors.posterior import Posterior as Posterior
from vaelab.posteriors.posterior import Space as Space
from vaelab.posteriors.sphere import VonMisesFisher as VonMisesFisher
from vaelab.posteriors.sphere import VonMisesFisherPosterior as VonMisesFisherPosterior
