"""Likelihoods p(x|z): from a decoder's output to a distribution over images."""

from vaelab.likelihoods.binary import Bernoulli as Bernoulli
from vaelab.likelihoods.binary import BernoulliImage as BernoulliImage
from vaelab.likelihoods.binary import softplus_sum as softplus_sum
from vaelab.likelihoods.levels import Categorical256 as Categorical256
from vaelab.likelihoods.levels import CategoricalImage as CategoricalImage
from vaelab.likelihoods.levels import DiscretizedLogistic as DiscretizedLogistic
from vaelab.likelihoods.levels import LogisticMixture as LogisticMixture
from vaelab.likelihoods.levels import LogisticMixtureImage as LogisticMixtureImage
from vaelab.likelihoods.likelihood import Likelihood as Likelihood
from vaelab.likelihoods.likelihood import Pixels as Pixels
from vaelab.likelihoods.likelihood import Support as Support
from vaelab.likelihoods.real import Gaussian as Gaussian
from vaelab.likelihoods.real import Laplace as Laplace
from vaelab.likelihoods.real import OptimalGaussian as OptimalGaussian
from vaelab.likelihoods.real import OptimalNormalImage as OptimalNormalImage
from vaelab.likelihoods.real import PixelGaussian as PixelGaussian
from vaelab.likelihoods.unit import ContinuousBernoulli as ContinuousBernoulli
from vaelab.likelihoods.unit import ContinuousBernoulliImage as ContinuousBernoulliImage
