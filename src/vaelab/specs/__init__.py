"""Specs: what a model and its training are made of, as plain data.

A spec is a frozen dataclass whose fields are the part's whole configuration; ``spec.build(...)`` makes the part, which
keeps it as ``part.spec``. Each default is written once, here. Nothing in this file imports torch: the command line can
print its help, and recipes can be listed, without it.

A field is declared by ``option``, or by ``positive`` where 0 is no value: with its line of help and its bounds.
"""

from vaelab.specs.likelihoods import Bernoulli as Bernoulli
from vaelab.specs.likelihoods import Categorical256 as Categorical256
from vaelab.specs.likelihoods import ContinuousBernoulli as ContinuousBernoulli
from vaelab.specs.likelihoods import DiscretizedLogistic as DiscretizedLogistic
from vaelab.specs.likelihoods import Gaussian as Gaussian
from vaelab.specs.likelihoods import Laplace as Laplace
from vaelab.specs.likelihoods import LogisticMixture as LogisticMixture
from vaelab.specs.likelihoods import OptimalGaussian as OptimalGaussian
from vaelab.specs.likelihoods import PixelGaussian as PixelGaussian
from vaelab.specs.networks import ConvDecoder as ConvDecoder
from vaelab.specs.networks import ConvEncoder as ConvEncoder
from vaelab.specs.networks import MLPDecoder as MLPDecoder
from vaelab.specs.networks import MLPEncoder as MLPEncoder
from vaelab.specs.networks import ResidualDecoder as ResidualDecoder
from vaelab.specs.networks import ResidualEncoder as ResidualEncoder
from vaelab.specs.optimizers import Adagrad as Adagrad
from vaelab.specs.optimizers import Adam as Adam
from vaelab.specs.optimizers import AdamW as AdamW
from vaelab.specs.optimizers import Constant as Constant
from vaelab.specs.optimizers import Cyclic as Cyclic
from vaelab.specs.optimizers import Plateau as Plateau
from vaelab.specs.optimizers import WarmupCosine as WarmupCosine
from vaelab.specs.posteriors import IAF as IAF
from vaelab.specs.posteriors import Deterministic as Deterministic
from vaelab.specs.posteriors import DiagonalNormal as DiagonalNormal
from vaelab.specs.posteriors import FullNormal as FullNormal
from vaelab.specs.posteriors import GumbelSoftmax as GumbelSoftmax
from vaelab.specs.posteriors import PlanarFlow as PlanarFlow
from vaelab.specs.posteriors import RadialFlow as RadialFlow
from vaelab.specs.posteriors import VectorQuantized as VectorQuantized
from vaelab.specs.posteriors import VonMisesFisher as VonMisesFisher
from vaelab.specs.priors import FlowPrior as FlowPrior
from vaelab.specs.priors import Mixture as Mixture
from vaelab.specs.priors import StandardNormal as StandardNormal
from vaelab.specs.priors import TwoStage as TwoStage
from vaelab.specs.priors import UniformCategories as UniformCategories
from vaelab.specs.priors import UniformCodes as UniformCodes
from vaelab.specs.priors import UniformSphere as UniformSphere
from vaelab.specs.priors import VampPrior as VampPrior
from vaelab.specs.spec import Activation as Activation
from vaelab.specs.spec import Shape as Shape
from vaelab.specs.spec import Spec as Spec
from vaelab.specs.spec import option as option
from vaelab.specs.spec import positive as positive
