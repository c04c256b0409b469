r"""Normalising flows: invertible maps of latents whose log-determinants are cheap.

With :math:`z = f(z_0)` and :math:`z_0 \sim q_0`, :math:`\log q(z) = \log q_0(z_0) - \log |\det \partial f / \partial
z_0|`. Planar and radial flows are written here; the masked autoregressive networks are zuko's.

Shapes: B batch, D latent dimensions, T transforms, H numbers of context; leading dimensions of z are free.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, Literal, Self, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.nn.functional import softplus

FlowKind = Literal["coupling", "maf", "nsf"]


# --- flows whose parameters an encoder emits ------------------------------------------------------------------------


@dataclass(frozen=True)
class OneWay(ABC):
    """A flow whose inverse has no closed form; its fields are its parameters, of each example."""

    @abstractmethod
    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of z (*leading, D), and the log-determinant (*leading) of the map's Jacobian there."""

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Unknown."""
        kind = type(self).__name__.lower()
        raise NotImplementedError(
            f"a {kind} flow has no inverse in closed form, and so no density where it did not sample"
        )

    def held(self) -> Self:
        """The same map with its parameters held constant: gradients flow through z alone."""
        return replace(self, **{name: parameter.detach() for name, parameter in vars(self).items()})


@final
@dataclass(frozen=True)
class Planar(OneWay):
    r"""T planar transforms, :math:`f(z) = z + \hat u \tanh(w^T z + b)`, each with parameters of each example.

    They are invertible where :math:`w^T \hat u > -1`, for which u is moved along w: :math:`\hat u = u + (m(w^T u) - w^T
    u)\, w / \|w\|^2`. The inverse has no closed form.

    Args:
        u, w: (B, T, D).
        b: (B, T).

    Note:
        The paper's :math:`m(a) = -1 + \log(1 + e^a)` is not 0 at 0, so that :math:`\hat u` grows without bound as w
        goes to 0. Here :math:`m(a) = -1 + \log(1 + (e - 1)\, e^a)`, which is.

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, eq. 10 and appendix A.1.
        https://arxiv.org/abs/1505.05770
    """

    u: Tensor
    w: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of z, and the log-determinant there."""
        along = (self.w * self.u).sum(-1)
        slack = softplus(along + math.log(math.e - 1))  # 1 + w'u_hat, kept as such: it may be next to nothing
        square = self.w.square().sum(-1).clamp(min=1e-30)
        u_hat = self.u + ((slack - 1 - along) / square)[..., None] * self.w
        log_det = z.new_zeros(())
        for u, w, b, room in zip(u_hat.unbind(-2), self.w.unbind(-2), self.b.unbind(-1), slack.unbind(-1), strict=True):
            bend = torch.tanh((z * w).sum(-1) + b)
            # det = 1 + tanh'(.) w'u_hat with tanh' = 1 - tanh^2: a sum of what is positive.
            log_det = log_det + torch.log(bend.square() + (1 - bend.square()) * room)
            z = z + u * bend[..., None]
        return z, log_det


@final
@dataclass(frozen=True)
class Radial(OneWay):
    r"""T radial transforms, :math:`f(z) = z + \beta (z - c) / (\alpha + r)` with :math:`r = \|z - c\|`.

    Each draws latents towards a centre c of each example, or pushes them away. They are invertible where :math:`\beta >
    -\alpha`, for which :math:`\beta = -\alpha + \log(1 + e^b)`. The inverse has no closed form.

    Args:
        centre: (B, T, D).
        log_alpha, b: (B, T).

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, eq. 14 and appendix A.2.
        https://arxiv.org/abs/1505.05770
    """

    centre: Tensor
    log_alpha: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of z, and the log-determinant there."""
        alphas, sums = self.log_alpha.exp(), softplus(self.b)  # sums: alpha + beta
        log_det = z.new_zeros(())
        for centre, alpha, total in zip(self.centre.unbind(-2), alphas.unbind(-1), sums.unbind(-1), strict=True):
            away = z - centre
            r = torch.linalg.vector_norm(away, dim=-1)
            # D - 1 directions are stretched by 1 + beta h, the one along z - c by 1 + beta h + beta h' r; with
            # h = 1 / (alpha + r) both are sums of what is positive.
            stretch = (r + total) / (alpha + r)
            radial = (r.square() + 2 * alpha * r + alpha * total) / (alpha + r).square()
            log_det = log_det + (z.shape[-1] - 1) * torch.log(stretch) + torch.log(radial)
            z = centre + away * stretch[..., None]
        return z, log_det


# --- flows that are networks ----------------------------------------------------------------------------------------


@final
class MaskedFlow(nn.Module):
    r"""T transforms :math:`y_i = \tau(z_i; \theta_i(z_{<i}, h))`, the order of the dimensions reversed between them.

    A masked network gives all :math:`\theta_i` in one pass, so that the map is fast and its inverse takes D passes
    (two for ``"coupling"``). In fp32 under autocast too: the errors of T transforms would add up.

    Args:
        dim: D.
        context_dim: H; 0 for none.
        num_transforms: T.
        hidden_dims: of the network of each.
        kind: ``"maf"``: :math:`\tau` is affine; ``"nsf"``: a monotone rational-quadratic spline of 8 pieces on [-5, 5]
            and the identity outside; ``"coupling"``: affine, and the second half of the dimensions depends on the
            first half alone.

    Note:
        As a coupling is a masked network of two passes, its first half is shifted and scaled too, by constants.

    Reference:
        Papamakarios, Pavlakou & Murray (2017), Masked Autoregressive Flow (MAF). https://arxiv.org/abs/1705.07057
        Dinh, Sohl-Dickstein & Bengio (2017), Real NVP (coupling). https://arxiv.org/abs/1605.08803
        Durkan et al. (2019), Neural Spline Flows (NSF). https://arxiv.org/abs/1906.04032
        Rozet et al. (2022), Zuko (the networks). https://github.com/probabilists/zuko
    """

    def __init__(
        self, dim: int, context_dim: int, num_transforms: int, hidden_dims: Sequence[int], kind: FlowKind = "maf"
    ) -> None:
        super().__init__()
        flows, transforms = _zuko()
        spline = {"univariate": partial(transforms.MonotonicRQSTransform, bound=5.0), "shapes": ((8,), (8,), (7,))}
        options: dict[str, Any] = {"passes": 2} if kind == "coupling" else spline if kind == "nsf" else {}
        order = torch.arange(dim)
        self.steps = nn.ModuleList(
            flows.MaskedAutoregressiveTransform(
                dim, context_dim, order=order.flip(0) if step % 2 else order, hidden_features=tuple(hidden_dims),
                activation=nn.ELU, **options,
            )
            for step in range(num_transforms)
        )  # fmt: skip

    def forward(self, z: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Map z (*leading, D), or map back what was mapped; the log-determinant (*leading) is the map's in both.

        Args:
            z: latents.
            context: h (B, H), whose rows belong to the last of the leading dimensions.
            inverse: map back.
        """
        with torch.autocast(z.device.type, enabled=False):
            log_det = z.new_zeros(())
            for step in reversed(self.steps) if inverse else self.steps:
                transform = step(context)
                if inverse:
                    image, z = z, transform.inv(z)
                    log_det = log_det + transform.log_abs_det_jacobian(z, image)
                else:
                    z, one = transform.call_and_ladj(z)
                    log_det = log_det + one
            return z, log_det


@final
@dataclass(frozen=True)
class Conditioned:
    """A masked flow, given its context: an inverse autoregressive flow, of which sampling is the fast direction.

    Args:
        network: the flow.
        context: (B, H), of each example.
        is_held: hold the network's parameters constant.
    """

    network: MaskedFlow
    context: Tensor
    is_held: bool = False

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of z, and the log-determinant there."""
        return self._map(z, inverse=False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What is mapped to z, one dimension after another, and the map's log-determinant there, not its inverse's."""
        return self._map(z, inverse=True)

    def held(self) -> Conditioned:
        """The same map with its parameters held constant: gradients flow through z alone."""
        return Conditioned(self.network, self.context.detach(), is_held=True)

    def _map(self, z: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if not self.is_held:
            return self.network(z, self.context, inverse=inverse)
        constants = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        return functional_call(self.network, constants, (z, self.context), {"inverse": inverse})


Flow = OneWay | Conditioned
"""An invertible map of latents (*leading, D), with parameters of its own for each of B examples."""


def _zuko() -> tuple[ModuleType, ModuleType]:
    """Zuko's flows and transforms, imported when one is built.

    Importing it switches off the validation of arguments for every distribution of torch in the process, the user's
    too. That is put back.
    """
    validates: bool = cast(Any, Distribution)._validate_args
    try:
        import zuko.flows
        import zuko.transforms
    finally:
        Distribution.set_default_validate_args(validates)
    return zuko.flows, zuko.transforms
