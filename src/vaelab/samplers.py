r"""Hamiltonian Monte Carlo and annealed importance sampling, of many chains at once.

A target is a function of all chains' states together: its rows are independent, so one call does the work of every
chain in a few big products. Randomness is passed in. Nothing here knows of models.

Shapes: M chains (the rows of a batch), D dimensions, P log-densities, T distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps states (M, D) to ``(log q0, log p*)``, each (M,): where a path starts and where it ends."""

Draws = Callable[[int], tuple[Tensor, Tensor]]
"""The noise of the i-th transition, i = 0, 1, ...: standard normal (M, D), and two uniforms in [0, 1), (2, M)."""

TARGET_ACCEPTANCE = 0.65  # optimal for HMC in many dimensions (0.651): Beskos et al. (2013), arXiv 1001.4460
_WARMUP = 20  # transitions that find the first step size
_GAIN = 0.2  # of the step size's logarithm, per transition and unit of acceptance


@final
class Annealed(NamedTuple):
    """What an annealing run leaves.

    Args:
        log_w: (M,), log importance weights in nats, in float64 on the CPU.
        acceptance: (M,), the share of accepted transitions; NaN where there were none (T = 1).
        z: (M, D), the last states.
    """

    log_w: Tensor
    acceptance: Tensor
    z: Tensor


def sigmoid_schedule(num_distributions: int, radius: float = 4.0) -> Tensor:
    r"""Inverse temperatures :math:`0 = b_0 < \dots < b_T = 1`, closest at the ends: a sigmoid on [-radius, radius].

    Args:
        num_distributions: T; with T = 1 annealing is plain importance sampling.
        radius: where the sigmoid is cut.

    Returns:
        (T + 1,), float64.

    Raises:
        ValueError: if T < 1.

    Reference:
        Grosse, Ghahramani & Adams (2015), of bidirectional Monte Carlo. https://arxiv.org/abs/1511.02543

    Example:
        >>> sigmoid_schedule(4)
        tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    if num_distributions < 1:
        raise ValueError(f"annealing needs at least one distribution after the first: got {num_distributions}")
    heights = torch.sigmoid(torch.linspace(-radius, radius, num_distributions + 1, dtype=torch.float64))
    return (heights - heights[0]) / (heights[-1] - heights[0])


def annealed_importance_sampling(
    log_densities: LogDensities,
    z: Tensor,
    betas: Tensor,
    eps: Tensor,
    draws: Draws,
    *,
    num_leapfrog: int = 10,
    reverse: bool = False,
) -> Annealed:
    r"""Weigh chains that are led from one distribution to another, along the geometric path.

    With :math:`\log f_b = (1 - b) \log q_0 + b \log p^*`, a chain starts at :math:`z_0 \sim q_0`, takes one HMC
    transition at each of :math:`b_1, \dots, b_{T-1}`, and its weight is

    .. math:: \log w = \sum_{t=1}^{T} (b_t - b_{t-1}) (\log p^*(z_{t-1}) - \log q_0(z_{t-1})).

    Then :math:`E[w] = \int p^* / \int q_0` exactly, for any T, so that :math:`\log w` is a lower bound in expectation.
    In reverse the chain starts at an exact sample of :math:`p^*` and takes the same transitions in the opposite order:
    :math:`E[w] = \int q_0 / \int p^*`, so that :math:`-\log w` is an upper bound (bidirectional Monte Carlo).

    All of this asks that the step sizes do not depend on the chains: see ``pilot_step_sizes``. Each transition scatters
    its own by up to a half, as trajectories of one length can be a whole period of the target, and lead back to where
    they began (Neal, 2011); in one VAE of MNIST that took about a quarter of the variance of log w away.

    Args:
        log_densities: ``(log q0, log p*)`` of every row, both from one call.
        z: (M, D), exact samples of q0; in reverse, of p*.
        betas: (T + 1,), rising from 0 to 1.
        eps: (T - 1, M), the step sizes at b_1, ..., b_{T-1}, in this order for both directions.
        draws: the noise of the transitions.
        num_leapfrog: leapfrog steps a transition.
        reverse: from p* to q0.

    Raises:
        ValueError: if there is not one step size for each transition.

    Reference:
        Neal (2001), Annealed Importance Sampling. https://arxiv.org/abs/physics/9803008
        Wu, Burda, Salakhutdinov & Grosse (2017), of decoders. https://arxiv.org/abs/1611.04273
        Grosse, Ghahramani & Adams (2015), of both directions. https://arxiv.org/abs/1511.02543
    """
    if eps.shape[0] != len(betas) - 2:
        raise ValueError(f"{len(betas) - 2} transitions need as many step sizes: got {eps.shape[0]}")
    temperatures = [float(b) for b in betas]
    if reverse:
        temperatures, eps = temperatures[::-1], eps.flip(0)
    point = _at(log_densities, z)
    # On the CPU: some accelerators have no float64.
    log_w, moves = torch.zeros(len(z), dtype=torch.float64), torch.zeros(len(z), dtype=torch.float64)
    for i, (b, following) in enumerate(zip(temperatures[:-1], temperatures[1:], strict=True)):
        log_w += (following - b) * (point.terms[1] - point.terms[0]).cpu().double()
        if i < len(eps):
            weights = z.new_tensor([1 - following, following])
            momentum, uniform = draws(i)
            scattered = eps[i] * (0.5 + uniform[0])
            point, accepted, _ = _transition(
                log_densities, weights, point, scattered, momentum, uniform[1], num_leapfrog
            )
            moves += accepted.cpu()
    return Annealed(log_w, moves / len(eps), point.z)


def pilot_step_sizes(
    log_densities: LogDensities, z: Tensor, betas: Tensor, draws: Draws, *, num_chains: int, num_leapfrog: int = 10
) -> Tensor:
    r"""Step sizes for every temperature, from a run of chains that serve for nothing else.

    A run that adapts its own step sizes has transitions that depend on its past: they leave nothing exactly invariant,
    and its weights are biased. So these chains are annealed first, forward; after each transition

    .. math:: \log \epsilon \mathrel{+}= g\, (\bar a - 0.65),

    with the mean acceptance probability :math:`\bar a` of the chains that share it, and what results is recorded for
    that temperature. The run that is measured uses the record as it stands.

    Args:
        log_densities: as in ``annealed_importance_sampling``.
        z: (num_chains * B, D), samples of q0, the chains leading: row ``c * B + i`` is a chain of problem i.
        betas: (T + 1,), rising from 0 to 1.
        draws: noise of its own; the first 20 are of transitions at b_1 that find the first step size.
        num_chains: chains that share a step size.
        num_leapfrog: leapfrog steps a transition.

    Returns:
        (T - 1, B), the step sizes at b_1, ..., b_{T-1}.
    """
    temperatures = [float(b) for b in betas[1:-1]]
    if not temperatures:
        return z.new_empty(0, len(z) // num_chains)
    point = _at(log_densities, z)
    log_eps = z.new_zeros(len(z) // num_chains)
    record: list[Tensor] = []
    for i, b in enumerate(temperatures[:1] * _WARMUP + temperatures):
        momentum, uniform = draws(i)
        eps = log_eps.exp().repeat(num_chains) * (0.5 + uniform[0])
        weights = z.new_tensor([1 - b, b])
        point, _, probability = _transition(log_densities, weights, point, eps, momentum, uniform[1], num_leapfrog)
        # The first step size, 1, may be far off: large gains at first.
        gain = max(_GAIN, 4 / (1 + i))
        log_eps = log_eps + gain * (probability.reshape(num_chains, -1).mean(0) - TARGET_ACCEPTANCE)
        record.append(log_eps.exp())
    return torch.stack(record[_WARMUP:])


def hamiltonian(
    log_density: Callable[[Tensor], Tensor], z: Tensor, eps: Tensor, momentum: Tensor, uniforms: Tensor,
    num_leapfrog: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One Hamiltonian transition of each row, which leaves its density invariant.

    Args:
        log_density: of every row, (M, D) to (M,), up to a constant.
        z: (M, D), where the chains are.
        eps: step sizes, (M,) or one for all; each transition scatters them by up to a half.
        momentum: standard normal (M, D).
        uniforms: (2, M), in [0, 1).
        num_leapfrog: leapfrog steps, a gradient each.

    Returns:
        Where they are then (M, D), and with what probability each proposal was accepted (M,).
    """

    def terms(z: Tensor) -> tuple[Tensor]:
        return (log_density(z),)

    point, scattered = _at(terms, z), (eps * (0.5 + uniforms[0])).expand(len(z))
    moved, _, probability = _transition(terms, z.new_ones(1), point, scattered, momentum, uniforms[1], num_leapfrog)
    return moved.z, probability


# --- one transition -------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    """Where the chains are, with all that is known there: a transition starts with the last one's end."""

    z: Tensor  # (M, D)
    terms: Tensor  # (P, M)
    slopes: Tensor  # (P, M, D), the terms' gradients: one set serves every temperature


def _at(log_densities: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor) -> _Point:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        terms = log_densities(z)
        # Rows are independent: the gradient of the sum holds each row's own.
        slopes = [
            torch.autograd.grad(term.sum(), z, retain_graph=i < len(terms) - 1)[0] for i, term in enumerate(terms)
        ]
    return _Point(z.detach(), torch.stack([term.detach() for term in terms]), torch.stack(slopes))


def _transition(
    log_densities: Callable[[Tensor], tuple[Tensor, ...]],
    weights: Tensor,
    point: _Point,
    eps: Tensor,
    momentum: Tensor,
    uniform: Tensor,
    num_leapfrog: int,
) -> tuple[_Point, Tensor, Tensor]:
    r"""Hamiltonian Monte Carlo on the weighted sum of log-densities; it leaves each row's density invariant.

    From :math:`H(z, r) = -\log p(z) + \frac12 |r|^2`, leapfrog steps lead to :math:`(z', r')`, which is accepted with
    probability :math:`\min(1, e^{H(z, r) - H(z', r')})`. A row whose proposal has a density or a gradient that is not
    finite stays where it is.

    Returns:
        The new point, which rows moved, and their probabilities to (M,).

    Reference:
        Neal (2011), MCMC using Hamiltonian dynamics. https://arxiv.org/abs/1206.1901
    """
    eps = eps[:, None]
    proposal = point
    r = momentum + eps / 2 * _slope(weights, point)
    for step in range(num_leapfrog):
        proposal = _at(log_densities, proposal.z + eps * r)
        # The half steps between two whole ones are taken together.
        r = r + (eps if step < num_leapfrog - 1 else eps / 2) * _slope(weights, proposal)
    change = weights @ (proposal.terms - point.terms) - (r.square() - momentum.square()).sum(1) / 2
    # An infinite density is an overflow somewhere on the way, never a good place.
    probability = torch.where(change.isfinite(), change.clamp(max=0).exp(), 0)
    accepted = uniform < probability
    rows = accepted[:, None]
    moved = _Point(
        torch.where(rows, proposal.z, point.z),
        torch.where(accepted, proposal.terms, point.terms),
        torch.where(rows, proposal.slopes, point.slopes),
    )
    return moved, accepted, probability


def _slope(weights: Tensor, point: _Point) -> Tensor:
    return (weights[:, None, None] * point.slopes).sum(0)
