"""Specs: what a model and its training are made of, as plain data.

A spec is a frozen dataclass whose fields are the part's whole configuration; ``spec.build(...)`` makes the part, which
keeps it as ``part.spec``. Each default is written once, here. Nothing in this file imports torch: the command line can
print its help, and recipes can be listed, without it.

Field metadata: ``help`` is the line that ``--help`` prints, ``aliases`` are other names under which a flag is known.
"""

from vaelab.specs.likelihoods import Bernoulli as Bernoulli
from vaelab.specs.likelihoods import Gaussian as Gaussian
from vaelab.specs.networks import ConvDecoder as ConvDecoder
from vaelab.specs.networks import ConvEncoder as ConvEncoder
from vaelab.specs.networks import MLPDecoder as MLPDecoder
from vaelab.specs.networks import MLPEncoder as MLPEncoder
from vaelab.specs.optimizers import Adam as Adam
from vaelab.specs.optimizers import AdamW as AdamW
from vaelab.specs.optimizers import Constant as Constant
from vaelab.specs.optimizers import Cyclic as Cyclic
from vaelab.specs.optimizers import Plateau as Plateau
from vaelab.specs.optimizers import WarmupCosine as WarmupCosine
from vaelab.specs.posteriors import DiagonalNormal as DiagonalNormal
from vaelab.specs.priors import Mixture as Mixture
from vaelab.specs.priors import StandardNormal as StandardNormal
from vaelab.specs.priors import VampPrior as VampPrior
from vaelab.specs.spec import Activation as Activation
from vaelab.specs.spec import Shape as Shape
from vaelab.specs.spec import Spec as Spec
from vaelab.specs.spec import option as option
