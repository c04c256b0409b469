"""Latents that are vectors of a codebook.

Shapes: K samples, B batch, F features, S sites (h w), M codes, C dimensions of a code, D = C S latent dimensions.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vaelab import specs
from vaelab.distribution import PointMass
from vaelab.errors import UsageError
from vaelab.posteriors.posterior import Head, LogDensity, Space
from vaelab.processes.distributed import Team
from vaelab.runtime import Noise


@final
class CodePosterior(PointMass):
    """All mass on one code at each site, so that the log-mass of what is drawn is 0.

    Args:
        loc: (B, D), the codes' vectors, channels first (C, S); straight through backwards.
        codes: (B, S), their numbers.
        penalty: (B,), the commitment.
    """

    def __init__(self, loc: Tensor, codes: Tensor, penalty: Tensor | None) -> None:
        super().__init__(loc)
        self.codes, self.penalty = codes, penalty

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass (*leading) of latents (*leading, D): 0 for these very vectors, else minus infinity."""
        same = (value == self.loc).all(-1)
        return torch.where(same, 0.0, -math.inf)

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity]:
        """The codes' vectors, repeated, with log-mass 0; no noise is drawn."""
        z = self.rsample(shape)
        return z, lambda: z.new_zeros(z.shape[:-1])


@final
class VectorQuantized(Head[specs.VectorQuantized]):
    r"""Head of an encoder: each site of a grid takes the closest vector of a learned codebook.

    A linear map of a site's features gives :math:`z_e`; its code is :math:`e = \arg\min_k |z_e - e_k|^2`. Forwards
    :math:`z = e`, backwards z counts as :math:`z_e` (straight through). The posterior's penalty is the commitment,
    :math:`\gamma \sum |z_e - \mathrm{sg}(e)|^2` over sites and dimensions.

    The codebook has no gradient: it is made of moving averages of the encoder's outputs, with decay :math:`\lambda`.
    With :math:`n_k` the share of a step's vectors whose code is k, and :math:`s_k` their sum over the count of all,

    .. math:: N_k \leftarrow \lambda N_k + (1 - \lambda) n_k, \quad m_k \leftarrow \lambda m_k + (1 - \lambda) s_k,
        \quad e_k = m_k / N_k.

    A forward pass in training mode only notes what it saw; ``move``, after the optimizer's step, moves the codebook.
    So a draw changes no later draw, a step that fails changes nothing, and every process has the same codebook.

    Args:
        spec: the configuration.
        in_features: F, read as (F / S, h, w), channels first, as convolutions give them.

    Raises:
        UsageError: if F is no multiple of S.

    Note:
        The paper's averages are of counts and sums; shares and means are the same up to a factor that cancels in
        :math:`e_k`, and the mean over processes is then that of the whole batch. Codes that are next to unused
        (:math:`M N_k` below ``restart_below``) are set to outputs of the encoder, which the paper does not do. The
        commitment is summed, in nats beside log p(x|z) of an image, where the authors' code takes means of both.

    Reference:
        van den Oord, Vinyals & Kavukcuoglu (2017), Neural Discrete Representation Learning, section 3.2 and appendix
        A.1. https://arxiv.org/abs/1711.00937
    """

    space: Space = "codes"
    codebook: Tensor
    share: Tensor
    total: Tensor
    seen: Tensor

    def __init__(self, spec: specs.VectorQuantized, in_features: int) -> None:
        super().__init__(spec, spec.code_dim * math.prod(spec.grid))
        self.sites = math.prod(spec.grid)
        channels, rest = divmod(in_features, max(1, self.sites))
        if rest or not channels:
            height, width = spec.grid
            raise UsageError(
                f"--grid {height} {width}: the encoder's {in_features} features are no multiple of {self.sites} sites; "
                "choose the height and width at which its convolutions end (each may halve an image's sides: 28x28 "
                "ends at 7 7 after two that do, 16x20 at 4 5)"
            )
        self.to_code = nn.Conv2d(channels, spec.code_dim, 1)
        self.register_buffer("codebook", torch.randn(spec.num_codes, spec.code_dim))
        self.register_buffer("share", torch.empty(spec.num_codes))
        self.register_buffer("total", torch.empty(spec.num_codes, spec.code_dim))
        # Of the last batch, for each code: its share, the sum of its vectors, and a vector to restart it at.
        self.register_buffer("seen", torch.zeros(spec.num_codes, 1 + 2 * spec.code_dim), persistent=False)
        self._start(self.codebook)

    def forward(self, features: Float[Tensor, "B F"]) -> CodePosterior:
        """The posterior of each example."""
        z_e = self._sites(features)
        codes = nearest(z_e, self.codebook)
        e = self.codebook[codes]
        if self.training:
            self._note(z_e.detach().flatten(0, 1), codes.flatten())
        penalty = self.spec.commitment * (z_e - e).square().sum((1, 2))
        # In these brackets: the forward value is the code itself, to the last bit.
        z = e + (z_e - z_e.detach())
        return CodePosterior(z.mT.flatten(1), codes, penalty)

    def start_at(self, features: Float[Tensor, "B F"]) -> None:
        """Set the codes to what some images' features give, one after the other, from a site that wanders."""
        with torch.no_grad():
            z_e = self._sites(features)
            row = torch.arange(len(self.codebook), device=z_e.device)
            self._start(z_e[row % len(z_e), (row + row // len(z_e)) % self.sites])

    def excess(self, features: Float[Tensor, "B F"], z: Float[Tensor, "B D"]) -> Float[Tensor, "B S"]:
        r"""How much farther from :math:`z_e` latents lie than the closest code: 0, or rounding where codes all but tie.

        :math:`(|z_e - z|^2 - \min_k |z_e - e_k|^2) / |z_e|^2` of each site; infinite where z is no code.
        """
        codebook, z_e = self.codebook.double(), self._sites(features).double()
        vectors = z.double().reshape(len(z), -1, self.sites).mT
        is_code = torch.cdist(vectors, codebook).amin(2) <= 1e-6 * codebook.square().sum(1).amax().sqrt()
        farther = (z_e - vectors).square().sum(2) - torch.cdist(z_e, codebook).amin(2).square()
        return torch.where(is_code, farther / z_e.square().sum(2), math.inf)

    def move(self, team: Team) -> None:
        """Move the codebook to what the last training batch showed, that of all processes together; after each step."""
        with torch.no_grad():
            seen, half = self.seen.clone(), 1 + self.spec.code_dim
            # Each restart comes from one process: the mean with the others' zeros, times their number.
            mine = torch.arange(len(seen), device=seen.device) % team.world == team.rank
            seen[:, half:] *= team.world * mine[:, None]
            team.average_(seen)
            share, total, restart = seen[:, 0], seen[:, 1:half], seen[:, half:]
            self.share.lerp_(share, 1 - self.spec.codebook_decay)
            self.total.lerp_(total, 1 - self.spec.codebook_decay)
            even = 1 / len(self.share)
            dead = self.share < self.spec.restart_below * even
            self.share.masked_fill_(dead, even)
            self.total.copy_(torch.where(dead[:, None], even * restart, self.total))
            # A code that is seen no more keeps its place: near 0 averages lose their digits, and 0 / 0 has none.
            least = 1e-30
            moved = self.total / self.share.clamp(min=least)[:, None]
            self.codebook.copy_(torch.where(self.share[:, None] > least, moved, self.codebook))

    def _sites(self, features: Tensor) -> Tensor:
        """(B, S, C), the vectors of every site."""
        height, width = self.spec.grid
        z_e = self.to_code(features.reshape(-1, self.to_code.in_channels, height, width))
        return z_e.float().flatten(2).mT

    def _start(self, vectors: Tensor) -> None:
        with torch.no_grad():
            self.codebook.copy_(vectors)
            self.share.fill_(1 / len(vectors))
            self.total.copy_(vectors / len(vectors))

    def _note(self, vectors: Tensor, codes: Tensor) -> None:
        """Note what (N, C) vectors with these codes (N,) say of each code."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            count = len(self.codebook)
            # A product, not a scattered sum: the same bits each time, on every device and by compiled code.
            chosen = (codes == torch.arange(count, device=codes.device)[:, None]).to(vectors.dtype) / len(codes)
            # Evenly spaced over a batch that comes in random order, at sites that wander over the whole grid.
            row, site = torch.arange(count, device=codes.device), self.sites
            spread = row * (len(codes) // site) // count * site + (row + row // site) % site
            self.seen.copy_(torch.cat([chosen.sum(1, keepdim=True), chosen @ vectors, vectors[spread]], 1))


def nearest(vectors: Float[Tensor, "*leading C"], codebook: Float[Tensor, "M C"]) -> Int[Tensor, "*leading"]:
    r"""The number of the closest code of each vector, the first of equally close ones.

    :math:`|z - e|^2 = |z|^2 - 2 z \cdot e + |e|^2` by one matrix product in fp32; the first term decides nothing.
    """
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        flat = vectors.reshape(-1, vectors.shape[-1]).to(codebook.dtype)
        score = torch.addmm(-0.5 * codebook.square().sum(1), flat, codebook.mT)
        return score.argmax(1).reshape(vectors.shape[:-1])
