"""Learning without a rate: autoencoders whose latents and decoder are held in bounds.

Shapes: K samples (1 here), B batch, C H W image, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from vaelab.objectives.objective import Objective, Parts, require_fixed_prior
from vaelab.specs.spec import option

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch
    from vaelab.runtime import Noise


@final
@dataclass(frozen=True)
class RAE(Objective):
    r"""The regularised autoencoder: :math:`-\log p(x|z) + \frac\beta2 |z|^2 + \lambda R`, with z of any posterior.

    R is :math:`|\theta|^2`, over the decoder's parameters (``l2``), or :math:`|J|_F^2`, with J the Jacobian of the mean
    of p(x|z) by z (``gradient_penalty``), or both. With all weights 0 it is a plain autoencoder. No density of z is
    asked for, so that a deterministic encoder will do; and none is learned: samples need a density that is fitted to
    the codes afterwards.

    Args:
        latent_weight: beta.
        l2: lambda of the decoder's parameters.
        gradient_penalty: lambda of the Jacobian; None computes none, and saves a second pass through the decoder.

    Raises:
        UsageError: for a prior that learns: nothing would train it.

    Note:
        The paper takes :math:`|\nabla D(E(x))|^2` of a network with many outputs without saying how. Here it is the
        squared Frobenius norm, by Hutchinson's estimate with one probe, :math:`E_v |J^T v|^2 = |J|_F^2` for
        :math:`v \sim N(0, I)`: unbiased, and one product whatever C H W. It is taken at z held constant, as it is the
        decoder that is to be smooth. The paper's distortion is the squared error, that of a normal likelihood with
        :math:`\sigma^2 = \frac12`; other likelihoods ask for other weights.

    Reference:
        Ghosh, Sajjadi, Vergari, Black & Schoelkopf (2020), From Variational to Deterministic Autoencoders, eq. 8 to 11.
        https://arxiv.org/abs/1903.12436
        Hutchinson (1990), A Stochastic Estimator of the Trace of the Influence Matrix.
        https://doi.org/10.1080/03610919008812866
    """

    word: ClassVar[str] = "rae"
    terms: ClassVar[tuple[str, ...]] = ("distortion", "norm")
    holds_a_prior: ClassVar[bool] = False
    beta = 0.0
    latent_weight: float = option(0.05, "weight on half the squared length of z")
    l2: float = option(1e-4, "weight on the squared parameters of the decoder")
    gradient_penalty: float | None = option(None, "weight on the squared Jacobian of the decoder's mean; None: no such")

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """One group of all the model's parameters, none of them the prior's."""
        require_fixed_prior(model, self.word)
        return super().groups(model, networks)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """``distortion``, ``norm`` (half the squared length of z), ``penalty``, ``weights``, and ``jacobian``."""
        draw = model.draw(batch.x, noise=noise)
        z = draw.z[0][0]
        parts = {
            "distortion": -draw.log_px.mean(0),
            "norm": 0.5 * z.square().sum(-1),
            "penalty": draw.penalty,
            # The same for every image, so that the mean of this part, too, is what the loss is made of.
            "weights": squared_decoder(model).expand(len(z)),
        }
        if self.gradient_penalty is not None:
            parts["jacobian"] = squared_jacobian(model, z, noise)
        return parts

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + beta norm + lambda R + penalty."""
        loss = means["distortion"] + means["penalty"] + self.latent_weight * means["norm"] + self.l2 * means["weights"]
        return loss if self.gradient_penalty is None else loss + self.gradient_penalty * means["jacobian"]


def squared_decoder(model: VAE) -> Tensor:
    """The sum of the squares of the decoder's parameters, in fp32."""
    import torch

    return torch.stack([p.float().square().sum() for p in model.decoder.parameters()]).sum()


def squared_jacobian(model: VAE, z: Tensor, noise: Noise) -> Tensor:
    r"""An unbiased estimate of :math:`|\partial E[x|z] / \partial z|_F^2` at each z (B, D), from one probe; (B,).

    Differentiable in the decoder's parameters where gradients are on; they are switched on here for what it needs, so
    that it can be asked for under ``torch.no_grad`` too.
    """
    import torch

    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        mean = model.likelihood(z).mean
        probe = noise.normal("probe", tuple(mean.shape))
        (gradient,) = torch.autograd.grad(mean, z, probe, create_graph=learning)
    return gradient.square().sum(-1)
