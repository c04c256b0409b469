"""Likelihoods p(x|z): from a decoder's output to a distribution over images."""

from vaelab.likelihoods.binary import Bernoulli as Bernoulli
from vaelab.likelihoods.binary import BernoulliImage as BernoulliImage
from vaelab.likelihoods.binary import softplus_sum as softplus_sum
from vaelab.likelihoods.likelihood import Likelihood as Likelihood
from vaelab.likelihoods.likelihood import Support as Support
from vaelab.likelihoods.real import Gaussian as Gaussian
