"""The von Mises-Fisher posterior: latents on the unit sphere.

Shapes: K samples, B batch, F features, D dimensions of the space around the sphere, G points of a grid.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, softplus

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.errors import UsageError
from vaelab.posteriors.posterior import Head, LogDensity, Space
from vaelab.runtime import Noise

GRID = 256  # points of the angle's density
WINDOW = 12.0  # they reach so many standard deviations to both sides of the mode


def log_area(dim: int) -> float:
    r"""Logarithm of the area of the unit sphere in R^D: :math:`\log 2 + \frac D2 \log \pi - \log \Gamma(D / 2)`.

    Example:
        >>> round(math.exp(log_area(3)) / math.pi, 6)
        4.0
    """
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


@final
class VonMisesFisherPosterior(Unchecked):
    r"""The von Mises-Fisher law on the unit sphere: :math:`q(z|x) = C_D(\kappa) \exp(\kappa \mu^T z)`.

    A density with respect to the sphere's area. The angle :math:`\theta` between z and :math:`\mu` has the density
    :math:`\propto \exp(\kappa \cos \theta) \sin^{D-2} \theta`, whatever the direction in which z lies from :math:`\mu`.
    All that is not elementary (the normaliser, the moments of :math:`\cos \theta`, quantiles) is an integral over that
    angle, taken numerically on a grid.

    Args:
        loc: (B, D), unit vectors :math:`\mu`.
        kappa: (B,), the concentration :math:`\kappa > 0`; 0 is the uniform law.

    Note:
        The paper samples by rejection. Here one uniform number is put through the inverse of the angle's cumulative
        distribution, so that there is no loop and the gradient in :math:`\kappa` needs no correction.
        First derivatives alone are right: those in :math:`\kappa` are put in by hand (``AngleLaw``).

    Reference:
        Davidson et al. (2018), Hyperspherical Variational Auto-Encoders. https://arxiv.org/abs/1804.00891
    """

    has_rsample = True
    penalty: Tensor | None = None

    def __init__(self, loc: Tensor, kappa: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:])
        self.loc, self.kappa = loc, kappa

    @cached_property
    def angle(self) -> AngleLaw:
        """The law of the angle."""
        return AngleLaw(self.kappa, self.loc.shape[-1])

    @property
    def center(self) -> Tensor:
        """The mean direction."""
        return self.loc

    @property
    def mean(self) -> Tensor:
        r""":math:`A_D(\kappa) \mu` (B, D), with :math:`A_D = E \cos \theta`: inside the sphere, not on it."""
        return (1 + self.angle.mean)[..., None] * self.loc

    @property
    def variance(self) -> Tensor:
        r"""(B, D): :math:`\mu_d^2 \mathrm{Var}[\cos \theta] + (1 - \mu_d^2) E[\sin^2 \theta] / (D - 1)`."""
        mean, variance = self.angle.mean[..., None], self.angle.variance[..., None]
        sine = -2 * mean - mean.square() - variance  # 1 - E cos^2
        return self.loc.square() * variance + (1 - self.loc.square()) * sine / (self.loc.shape[-1] - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-density (*leading) of unit vectors (*leading, D), in nats.

        As :math:`\mu^T z - 1 = -\|z - \mu\|^2 / 2` on the sphere, it is written without the difference of two near
        numbers that costs a thousandth of a nat at :math:`\kappa = 10^4`.
        """
        log_normaliser = self.angle.log_integral + log_area(self.loc.shape[-1] - 1)
        return -0.5 * self.kappa * (value - self.loc).square().sum(-1) - log_normaliser

    def kl_to_uniform(self) -> Tensor:
        r""":math:`\kappa A_D(\kappa) + \log C_D(\kappa) + \log |S^{D-1}|`, (B,), in nats.

        Reference:
            Davidson et al. (2018), eq. 12. https://arxiv.org/abs/1804.00891
        """
        return self.angle.negentropy + (log_area(self.loc.shape[-1]) - log_area(self.loc.shape[-1] - 1))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, B, D) by torch's global generator."""
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape[:-1], device=self.loc.device)
        return self._place(u, torch.randn((*shape[:-1], shape[-1] - 1), device=self.loc.device))

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity]:
        r"""Draw an angle by a uniform number (stream ``"angle"``), and where it lies around the mean by normal ones."""
        size, dim = self.loc.shape
        count = math.prod(shape)
        u = noise.uniform("angle", (size, count)).mT.reshape(*shape, size)
        eps = noise.normal("z", (size, count, dim - 1)).transpose(0, 1).reshape(*shape, size, dim - 1)
        held = VonMisesFisherPosterior(self.loc.detach(), self.kappa.detach()) if stop else self
        z = self._place(u, eps)
        return z, lambda: held.log_prob(z)

    def _place(self, u: Tensor, eps: Tensor) -> Tensor:
        r"""Turn uniform numbers u (*leading, B) and normal numbers eps (*leading, B, D - 1) into unit vectors.

        A point at the angle from the first axis is brought to the mean direction by a reflection. That which exchanges
        both would divide by their distance. The reflection that exchanges the axis and :math:`\mp \mu`, whichever is
        farther, never divides by less than 1, and its negative does the same up to the sign.
        """
        theta = self.angle.quantile(u)[..., None]
        around = normalize(eps, dim=-1)
        point = torch.cat([torch.cos(theta), torch.sin(theta) * around], -1)
        first = self.loc[..., :1]
        sign = torch.where(first >= 0, 1.0, -1.0).to(first)
        axis = torch.cat([first + sign, self.loc[..., 1:]], -1)  # mu + sign e1, of squared length 2 (1 + |mu_1|)
        return sign * (axis * ((axis * point).sum(-1, keepdim=True) / (1 + first.abs())) - point)


@final
class AngleLaw:
    r"""The density :math:`p(\theta) \propto f(\theta) = \exp(\kappa (\cos \theta - 1)) \sin^{D-2} \theta` on [0, pi].

    It is smooth and has one mode. Its integrals are taken on a grid around that, by the trapezoid rule with the
    correction that the slopes at both ends give, in float64 (float32 on a device that has no other): their error is of
    the fourth order in a spacing of some hundredths of a standard deviation.

    Derivatives are not those of this arithmetic but what they are known to be: :math:`d \log Z = E[\cos \theta - 1]\, d
    \kappa` and :math:`d E[\cos \theta] = \mathrm{Var}[\cos \theta]\, d \kappa`.

    Args:
        kappa: (*batch,).
        dim: D >= 2.

    Reference:
        Figurnov, Mohamed & Mnih (2018), Implicit Reparameterization Gradients. https://arxiv.org/abs/1805.08498
    """

    def __init__(self, kappa: Tensor, dim: int) -> None:
        self.dim, self.kappa = dim, kappa
        exact = torch.float32 if kappa.device.type == "mps" else torch.float64
        self._k = k = kappa.detach().to(exact).clamp(min=1e-9)[..., None]
        # At the mode kappa sin^2 = (D - 2) cos, and there -(log f)'' = kappa cos + (D - 2) / sin^2.
        root = (dim - 2) + torch.sqrt((dim - 2) ** 2 + 4 * k * k)
        self._mode = torch.atan2(torch.sqrt(2 * (dim - 2) / root), 2 * k / root)
        reach = WINDOW / torch.sqrt(2 * k * k / root + root / 2)
        low, high = (self._mode - reach).clamp(min=0), (self._mode + reach).clamp(max=math.pi)
        self._step = (high - low) / (GRID - 1)
        self._theta = low + self._step * torch.arange(GRID, device=k.device, dtype=exact)
        self._cos = -2 * torch.sin(self._theta / 2).square()  # cos - 1
        self._sin = torch.sin(self._theta).clamp(min=0)
        self._peak = self._log_f(self._mode)
        self._f = self._relative_f(self._theta)
        self._slope = self._slope_of_f()
        mass = self._integral(self._f, self._slope)
        self._mean = self._integral(self._cos * self._f, self._cos * self._slope - self._sin * self._f) / mass
        centred = self._cos - self._mean
        second = centred.square() * self._f, centred.square() * self._slope - 2 * centred * self._sin * self._f
        self._variance = self._integral(*second) / mass
        self._log_integral = torch.log(mass) + self._peak

    @property
    def log_integral(self) -> Tensor:
        r"""(*batch,), :math:`\log \int_0^\pi f`."""
        return self._moved(self._log_integral, self._mean)

    @property
    def mean(self) -> Tensor:
        r"""(*batch,), :math:`E[\cos \theta] - 1`."""
        return self._moved(self._mean, self._variance)

    @property
    def variance(self) -> Tensor:
        r"""(*batch,), of :math:`\cos \theta`; a constant to gradients."""
        return self._variance[..., 0].to(self.kappa)

    @property
    def negentropy(self) -> Tensor:
        r"""(*batch,), :math:`\kappa E[\cos \theta - 1] - \log \int f`: :math:`E[\log q(z)]`, but for a constant.

        Its derivative is :math:`\kappa \mathrm{Var}[\cos \theta]`.
        """
        return self._moved(self._k * self._mean - self._log_integral, self._k * self._variance)

    def quantile(self, u: Tensor) -> Tensor:
        r"""The angle (*leading, *batch) below which there is the share u (*leading, *batch) of the probability.

        Its derivative in :math:`\kappa` at a constant u is :math:`-\partial_\kappa F(\theta) / p(\theta)`, for the
        cumulative distribution F. Within a cell of the grid F and that derivative are cubics, as both slopes are known.
        """
        kappa = self.kappa[..., None]
        # Samples next to each other along the last axis: (*batch, K).
        rows = u.reshape(-1, *self.kappa.shape).movedim(0, -1).to(self._k)
        theta, slope = self._invert(rows.clamp(min=2.0**-25, max=1 - 2.0**-25))
        found = theta.to(kappa) + slope.to(kappa) * (kappa - kappa.detach())
        return found.movedim(-1, 0).reshape(u.shape)

    def _invert(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Angles (*batch, K), and their derivatives in kappa."""
        f, slope, h, least = self._f, self._slope, self._step, torch.finfo(self._f.dtype).tiny
        masses = self._cells(f, slope).clamp(min=0)
        until = torch.cumsum(masses, -1)
        wanted = (u * until[..., -1:]).contiguous()
        cell = torch.searchsorted(until, wanted, right=True).clamp(max=GRID - 2)
        # A linear f puts the angle where f_0 t + (f_1 - f_0) t^2 / 2 is the wanted share of the cell's trapezoid ...
        inside = masses.gather(-1, cell)
        share = ((wanted - (until.gather(-1, cell) - inside)) / inside.clamp(min=least)).clamp(0, 1)
        left, right = f.gather(-1, cell), f.gather(-1, cell + 1)
        root = torch.sqrt(left.square() + share * (right - left) * (left + right))
        t = (share * (left + right) / (left + root).clamp(min=least)).clamp(0, 1)
        # ... and a step of Newton's brings it to where the cubic is.
        low = self._theta.gather(-1, cell)
        density = self._relative_f(low + t * h).clamp(min=least)
        t = (t - (self._cubic(pad(until, (1, 0)), f, cell, t) - wanted) / (h * density)).clamp(0, 1)
        theta = low + t * h
        # dF/dkappa, up to the constant that p has too: the integral of f (cos - E cos).
        centred = self._cos - self._mean
        g, steepness = centred * f, centred * slope - self._sin * f
        change = self._cubic(pad(torch.cumsum(self._cells(g, steepness), -1), (1, 0)), g, cell, t)
        return theta, -change / self._relative_f(theta).clamp(min=least)

    def _cubic(self, values: Tensor, slopes: Tensor, cell: Tensor, t: Tensor) -> Tensor:
        """Hermite's cubic through values (*batch, G) at the grid that have these slopes, at t in [0, 1] of a cell."""
        (v0, v1), (s0, s1) = ((x.gather(-1, cell), x.gather(-1, cell + 1)) for x in (values, slopes))
        return v0 + (v1 - v0) * t * t * (3 - 2 * t) + self._step * t * (1 - t) * (s0 * (1 - t) - s1 * t)

    def _moved(self, value: Tensor, derivative: Tensor) -> Tensor:
        """A value of kappa (*batch, 1) that has this derivative."""
        value, derivative = (x[..., 0].to(self.kappa) for x in (value, derivative))
        return value + derivative * (self.kappa - self.kappa.detach())

    def _relative_f(self, theta: Tensor) -> Tensor:
        """The density f over its largest value."""
        return torch.exp(self._log_f(theta) - self._peak)

    def _log_f(self, theta: Tensor) -> Tensor:
        sine = torch.sin(theta).clamp(min=0)
        power = theta.new_full((), self.dim - 2)
        return torch.xlogy(power, sine) - 2 * self._k * torch.sin(theta / 2).square()

    def _slope_of_f(self) -> Tensor:
        """The derivative of f, without a division by a sine that is 0 at the ends."""
        slope = -self._k * self._sin * self._f
        if self.dim == 2:
            return slope
        power = self._sin.new_full((), self.dim - 3)
        lower = torch.exp(torch.xlogy(power, self._sin) + self._k * self._cos - self._peak)
        return slope + (self.dim - 2) * (1 + self._cos) * lower

    def _cells(self, f: Tensor, slope: Tensor) -> Tensor:
        """The integral over each cell of the grid, (*batch, G - 1)."""
        h = self._step
        return 0.5 * h * (f[..., 1:] + f[..., :-1]) + h * h / 12 * (slope[..., :-1] - slope[..., 1:])

    def _integral(self, f: Tensor, slope: Tensor) -> Tensor:
        """The integral over the grid, (*batch, 1)."""
        h = self._step
        ends = 0.5 * h * (f[..., :1] + f[..., -1:]) + h * h / 12 * (slope[..., :1] - slope[..., -1:])
        return h * f[..., 1:-1].sum(-1, keepdim=True) + ends


@final
class VonMisesFisher(Head[specs.VonMisesFisher]):
    r"""Head of an encoder: a linear map of the features gives the mean direction and the concentration.

    :math:`\mu` is the first D numbers over their length, :math:`\kappa = 1 + \log(1 + e^a)` of the last one.

    Args:
        spec: the configuration. Its ``latent_dim`` is D: the sphere has one dimension less.
        in_features: F.

    Raises:
        UsageError: if D < 2.

    Note:
        That :math:`\kappa` is 1 at least is the authors' choice, in their code: the uniform law is approached (at D =
        10, :math:`\kappa = 1` costs 0.05 nats), never reached.

    Reference:
        Davidson et al. (2018), Hyperspherical Variational Auto-Encoders. https://arxiv.org/abs/1804.00891
    """

    space: Space = "sphere"

    def __init__(self, spec: specs.VonMisesFisher, in_features: int) -> None:
        super().__init__(spec, spec.latent_dim)
        if spec.latent_dim < 2:
            raise UsageError(f"--posterior vmf needs 2 dimensions at least to have a sphere in: got {spec.latent_dim}")
        self.direction_and_kappa = nn.Linear(in_features, spec.latent_dim + 1)

    def forward(self, features: Float[Tensor, "B F"]) -> VonMisesFisherPosterior:
        """The posterior of each example."""
        direction, kappa = self.direction_and_kappa(features).float().split([self.latent_dim, 1], -1)
        return VonMisesFisherPosterior(normalize(direction, dim=-1), 1 + softplus(kappa[..., 0]))
