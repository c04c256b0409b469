r"""The likelihood from samples of the true posterior: :math:`1 / p(x) = E_{p(z|x)} [q(z) / p(x, z)]` for any density q.

Shapes: B images at a time, L samples per image, D latent dimensions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vaelab.data.datasets import EVALUATION_SEED, Dataset
from vaelab.data.guard import require_fit
from vaelab.divergences import log_mean_exp
from vaelab.errors import UsageError
from vaelab.evaluate.elbo import bound_protocol
from vaelab.evaluate.estimate import Estimate
from vaelab.evaluate.pieces import Values, in_pieces, join, not_finite
from vaelab.models import SPACES, VAE
from vaelab.posteriors import Posterior
from vaelab.runtime import Noise, RowNoise
from vaelab.samplers import TARGET_ACCEPTANCE, hamiltonian

_IMAGES = 500  # at a time: what a step of all their chains decodes stays in the processor's cache


def reciprocal_nll(
    model: VAE, data: Dataset, split: str = "test", *, num_samples: int = 50, rows: int | None = None,
    num_leapfrog: int = 4,
) -> dict[str, Estimate]:  # fmt: skip
    r"""The negative log-likelihood by the estimator of *Auto-Encoding Variational Bayes*, in nats per example.

    For each image a chain of Hamiltonian Monte Carlo, from a draw of q(z|x): L transitions that find its step size
    (65 % accepted), L samples to which a normal density is fitted, of full covariance, and L new ones for

    .. math:: p(x) \approx \Big( \frac1L \sum_l \frac{q(z_l)}{p(z_l)\, p(x|z_l)} \Big)^{-1}.

    Of samples that are the posterior's, and independent of those that q is fitted to, the mean estimates 1/p(x)
    without bias, so that this is a *lower* bound on -log p(x) in expectation (Jensen), where importance sampling gives
    an upper one. A chain that has not arrived makes log p(x) too small, by any amount, and q with more mass in the
    tails than the posterior makes the mean's variance large; that, and the fit, are why it is for few dimensions (the
    paper: fewer than five).

    Args:
        model: the trained model.
        data: the data set under the protocol to score.
        split: train, validation or test.
        num_samples: L.
        rows: only the first so many images of the split; None: all.
        num_leapfrog: leapfrog steps a transition.

    Returns:
        ``nll_reciprocal``, and the ``acceptance`` of the samples that it is made of (a share).

    Raises:
        UsageError: if there are fewer than ten samples for each dimension, latents do not fill R^D, or the likelihood
            is none of these data.
        FailureError: if an estimate is not finite, naming the image.

    Reference:
        Kingma & Welling (2014), appendix D. https://arxiv.org/abs/1312.6114
    """
    require_fit(model.likelihood_head, data, (split,))
    if model.space != "real":
        raise UsageError(f"chains move along gradients, in R^D, and these latents lie in {SPACES[model.space]}: take "
                         "evaluate.nll")  # fmt: skip
    if num_samples < 10 * model.latent_dim:
        raise UsageError(f"a density is fitted to {num_samples} samples of {model.latent_dim} dimensions: at least ten "
                         "for each are needed; evaluate.nll needs none")  # fmt: skip
    if num_leapfrog < 1:
        raise UsageError(f"num_leapfrog {num_leapfrog}: must be at least 1")
    size = len(data.split(split)) if rows is None else min(rows, len(data.split(split)))
    pieces = [slice(start, min(start + _IMAGES, size)) for start in range(0, size, _IMAGES)]

    def score(piece: slice) -> Values:
        noise = RowNoise(EVALUATION_SEED, piece.start, data.train.device)
        log_px, acceptance = _log_px(model, data.scored(split, piece).x, num_samples, num_leapfrog, noise)
        bad = (~log_px.isfinite()).nonzero()
        if len(bad):
            raise not_finite("the estimate of log p(x)", piece.start + int(bad[0]), f"of the {split} split")
        return {"log_px": log_px.cpu().double().numpy(), "acceptance": acceptance.cpu().double().numpy()}

    values = join(in_pieces(model, pieces, score))
    how = f"reciprocal of {num_samples} posterior samples by HMC, {num_leapfrog} leapfrog steps"
    protocol = bound_protocol(model, data, split, how, rows)
    return {"nll_reciprocal": Estimate.of(-values["log_px"], "nats", protocol),
            "acceptance": Estimate.of(values["acceptance"], "share", protocol)}  # fmt: skip


def _log_px(model: VAE, x: Tensor, count: int, num_leapfrog: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """The estimate of log p(x), and the mean probability of acceptance, both (B,)."""
    pz, size = model.prior(), (len(x), model.latent_dim)

    def joint(z: Tensor) -> Tensor:
        return model.log_px(x, z[None])[0] + pz.log_prob(z)

    with torch.no_grad():
        z = cast(Posterior, model.posterior(x)).rsample_and_log_prob((1,), noise)[0][0]
    log_eps = z.new_full((len(x),), -1.0)
    chain: list[Tensor] = []
    probabilities: list[Tensor] = []
    for i in range(3 * count):
        momentum, uniforms = noise.normal(f"momentum {i}", size), noise.uniform(f"transition {i}", (len(x), 2)).mT
        z, probability = hamiltonian(joint, z, log_eps.exp(), momentum, uniforms, num_leapfrog)
        if i < count:  # large gains at first: the step size may be far off
            log_eps = log_eps + max(0.1, 2 / (1 + i)) * (probability - TARGET_ACCEPTANCE)
        else:
            chain.append(z)
            probabilities.append(probability)
    fitted, fresh = torch.stack(chain[:count]), torch.stack(chain[count:])
    loc = fitted.mean(0)
    off = (fitted - loc).movedim(0, -1)  # (B, D, L)
    covariance = off @ off.mT / (count - 1) + 1e-6 * torch.eye(size[1], device=z.device)
    qz = MultivariateNormal(loc, covariance, validate_args=False)
    with torch.no_grad():
        log_ratio = qz.log_prob(fresh) - model.log_px(x, fresh) - pz.log_prob(fresh)
    return -log_mean_exp(log_ratio), torch.stack(probabilities[count:]).mean(0)
