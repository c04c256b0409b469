"""Uniform priors over codes and over one-hot latents.

Shapes: S sites, M codes or classes, C dimensions of a code, D latent dimensions; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.kl import register_kl  # pyright: ignore[reportUnknownVariableType]

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.errors import UsageError
from vaelab.posteriors import CategoricalPosterior, CodePosterior, GumbelSoftmax, Head, Space, VectorQuantized
from vaelab.posteriors.codes import nearest
from vaelab.priors.prior import Encode, Prior
from vaelab.runtime import Noise
from vaelab.specs import Shape

_SAME = 1e-5  # of the codebook's greatest number, by which a vector may be off its code by rounding


@final
class UniformCodeVectors(Unchecked):
    r"""S codes of a codebook of M, each equally likely, as their vectors: :math:`\log p(z) = -S \log M`.

    Args:
        codebook: (M, C).
        sites: S; latents are (C, S), flat.
    """

    def __init__(self, codebook: Tensor, sites: int) -> None:
        size = torch.Size([sites * codebook.shape[1]])
        super().__init__(torch.Size(), size)
        self.codebook, self.sites = codebook, sites

    @property
    def entropy_nats(self) -> float:
        """S log M."""
        return self.sites * math.log(len(self.codebook))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass (*leading) of latents (*leading, D): minus infinity where a site's vector is no code's."""
        vectors = value.reshape(*value.shape[:-1], -1, self.sites).mT
        off = (vectors - self.codebook[nearest(vectors, self.codebook)]).abs().amax((-2, -1))
        return torch.where(off <= _SAME * self.codebook.abs().max(), -self.entropy_nats, -math.inf)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        shape = (*sample_shape, self.sites)
        return self._look_up(torch.randint(len(self.codebook), shape, device=self.codebook.device))

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D) from ``noise``."""
        return self._look_up(_numbers(noise.uniform("prior", (count, self.sites)), len(self.codebook)))

    def _look_up(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].mT.flatten(-2)


@final
class UniformOneHot(Unchecked):
    r"""S one-hot vectors of M classes, each equally likely: :math:`\log p(z) = -S \log M`.

    Args:
        uniform: (S, M), of 1 / M: it says on which device draws are made.
    """

    def __init__(self, uniform: Tensor) -> None:
        super().__init__(torch.Size(), torch.Size([uniform.numel()]))
        self.uniform = uniform

    @property
    def entropy_nats(self) -> float:
        """S log M."""
        sites, classes = self.uniform.shape
        return sites * math.log(classes)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass (*leading) of latents (*leading, D): minus infinity where a site is not one-hot."""
        by_site = value.reshape(*value.shape[:-1], *self.uniform.shape)
        is_one_hot = ((by_site == 0) | (by_site == 1)).all(-1) & (by_site.sum(-1) == 1)
        return torch.where(is_one_hot.all(-1), -self.entropy_nats, -math.inf)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        sites, classes = self.uniform.shape
        return self._one_hot(torch.randint(classes, (*sample_shape, sites), device=self.uniform.device))

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D) from ``noise``."""
        sites, classes = self.uniform.shape
        return self._one_hot(_numbers(noise.uniform("prior", (count, sites)), classes))

    def _one_hot(self, numbers: Tensor) -> Tensor:
        return nn.functional.one_hot(numbers, self.uniform.shape[1]).to(self.uniform.dtype).flatten(-2)


@final
class UniformCodes(Prior[specs.UniformCodes]):
    r"""Each of M vectors of the posterior's codebook is equally likely at each of S sites, :math:`p(z) = M^{-S}`.

    Note:
        After the training the authors learn an autoregressive prior over the codes; under this one samples are poor.

    Reference:
        van den Oord, Vinyals & Kavukcuoglu (2017), Neural Discrete Representation Learning, section 3.1.
        https://arxiv.org/abs/1711.00937
    """

    space: Space = "codes"

    def __init__(self, spec: specs.UniformCodes, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        if not isinstance(head, VectorQuantized):
            raise UsageError("--prior uniform-codes is over the vectors of a codebook: --posterior vq has one")
        self.sites = head.sites

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,), over the vectors of ``codebook``."""
        assert codebook is not None
        return UniformCodeVectors(codebook, self.sites)


@final
class UniformCategories(Prior[specs.UniformCategories]):
    r"""Each of M classes is equally likely at each of S sites, :math:`p(z) = M^{-S}`."""

    space: Space = "categories"
    uniform: Tensor

    def __init__(self, spec: specs.UniformCategories, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        if not isinstance(head, GumbelSoftmax):
            raise UsageError("--prior uniform-categories is over one-hot latents: --posterior gumbel-softmax has such")
        uniform = torch.full((head.spec.sites, head.spec.classes), 1 / head.spec.classes)
        self.register_buffer("uniform", uniform, persistent=False)

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,)."""
        return UniformOneHot(self.uniform)


def _numbers(uniform: Tensor, count: int) -> Tensor:
    """Whole numbers below ``count``, of uniform numbers in [0, 1)."""
    return (uniform * count).long().clamp(max=count - 1)


@register_kl(CodePosterior, UniformCodeVectors)
def _kl_of_codes(q: CodePosterior, p: UniformCodeVectors) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    r""":math:`S \log M`: q has no entropy."""
    return q.loc.new_full(q.batch_shape, p.entropy_nats)


@register_kl(CategoricalPosterior, UniformOneHot)
def _kl_of_categories(q: CategoricalPosterior, p: UniformOneHot) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    r""":math:`\sum_{sm} \pi_{sm} \log \pi_{sm} + S \log M`."""
    return (q.log_pi.exp() * q.log_pi).sum((-2, -1)) + p.entropy_nats
