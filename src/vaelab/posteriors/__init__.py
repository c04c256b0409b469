"""Approximate posteriors q(z|x): from an encoder's features to a distribution over the latents."""

from vaelab.posteriors.normal import DiagonalNormal as DiagonalNormal
from vaelab.posteriors.normal import NormalPosterior as NormalPosterior
from vaelab.posteriors.posterior import Head as Head
from vaelab.posteriors.posterior import LogDensity as LogDensity
from vaelab.posteriors.posterior import Posterior as Posterior
from vaelab.posteriors.posterior import Space as Space
