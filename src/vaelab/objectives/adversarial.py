r"""Objectives with a critic: a network that tells two distributions apart, and so measures how far apart they are.

The logit of the best critic between samples of a and of b is :math:`\log a / b`.

Shapes: B batch, D latent dimensions, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast, final

from vaelab.errors import UsageError
from vaelab.objectives.objective import (
    Group,
    Loss,
    Losses,
    Objective,
    Parts,
    common_parts,
    encoding_parameters,
    means_of,
    require_fixed_prior,
)  # fmt: skip
from vaelab.specs.spec import option, positive

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch
    from vaelab.posteriors import Posterior
    from vaelab.priors import PriorDistribution
    from vaelab.runtime import Noise


@final
@dataclass(frozen=True)
class Factor(Objective):
    r"""The ELBO, and the total correlation of the codes as a critic sees it: adds :math:`\gamma E_{q(z)} \log
    \frac{D(z)}{1 - D(z)}`.

    The critic D tells codes from codes whose dimensions were permuted over the batch, each for itself; the logarithm of
    its odds estimates :math:`\log q(z) / \prod_d q(z_d)`.

    Args:
        gamma: the weight on the total correlation.
        critic_dims: units of the critic's hidden layers.

    Raises:
        TypeError: for a posterior without a density, or whose latents are not any real vectors: permuted dimensions
            of a one-hot vector, a direction or a code are none.

    Note:
        The paper's critic has six layers of 1000 units, two outputs and an Adam of its own settings; here it is
        smaller, has one output (the same odds), and learns by the run's. The paper permutes codes of a second
        batch, here those of the same batch are permuted. The critic sees codes that were drawn before the model's step:
        taking both gradients before any step, as here, and stepping one after the other are the same.

    Reference:
        Kim & Mnih (2018), Disentangling by Factorising, eq. 2, 3 and algorithm 2. https://arxiv.org/abs/1802.05983
    """

    word: ClassVar[str] = "factor"
    terms: ClassVar[tuple[str, ...]] = ("distortion", "rate", "tc", "critic")
    in_batch: ClassVar[bool] = True
    gamma: float = option(10.0, "weight on the total correlation of the codes' dimensions")
    critic_dims: tuple[int, ...] = positive((256, 256, 256, 256), "units of each hidden layer of the critic")

    def networks(self, model: VAE) -> ModuleDict:
        """The critic of codes."""
        return _critic_of_codes(model.latent_dim, self.critic_dims)

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Model and critic."""
        return {"model": list(model.parameters()), "critic": list(networks.parameters())}

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, rate and penalty; ``tc``, and what the ``critic`` minimises."""
        from vaelab.divergences import permute_dimensions

        if model.space != "real":
            raise TypeError(f"permuted dimensions are no latents of this model: its latents are {model.space}")
        draw = model.draw(batch.x, noise=noise)
        z, critic = draw.z[0][0], networks["critic"]
        joint = critic(z).float()
        permuted = critic(permute_dimensions(z.detach(), noise)).float()
        return {**common_parts(draw), "tc": joint, "critic": _telling(joint, permuted)}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + rate + gamma * tc + penalty."""
        return means["distortion"] + means["rate"] + self.gamma * means["tc"] + means["penalty"]

    def shares(self, loss: Tensor, means: Mapping[str, Tensor]) -> tuple[Group, Loss]:
        """The critic's is a part of its own."""
        return ("model", "critic"), (loss, means["critic"])


@final
@dataclass(frozen=True)
class AAE(Objective):
    r"""An autoencoder whose codes a critic cannot tell from the prior: minimise :math:`-E_q[\log p(x|z)]`, and
    :math:`-E_{q(z)} \log D(z)`.

    Each batch takes three steps: reconstruction (encoder and decoder), the critic D, which is to tell samples of the
    prior from codes, and the encoder, which is to be taken for the prior.

    Args:
        critic_dims: units of the critic's hidden layers.

    Raises:
        UsageError: for a prior that learns.

    Note:
        Encoder and head stand in two groups and so have two optimizers, as in the paper; they take one learning rate
        here. Monitored is distortion + ``adversarial``, the encoder's loss, which is log 2 where the critic is at a
        loss. It says little while the critic is learning.

    Reference:
        Makhzani et al. (2016), Adversarial Autoencoders, section 2. https://arxiv.org/abs/1511.05644
    """

    word: ClassVar[str] = "aae"
    terms: ClassVar[tuple[str, ...]] = ("distortion", "adversarial", "critic")
    beta = 0.0
    critic_dims: tuple[int, ...] = positive((1000, 1000), "units of each hidden layer of the critic")

    def networks(self, model: VAE) -> ModuleDict:
        """The critic of codes."""
        return _critic_of_codes(model.latent_dim, self.critic_dims)

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """The whole model, the critic, and the encoder once more."""
        require_fixed_prior(model, self.word)
        return {"autoencoder": list(model.parameters()), "critic": list(networks.parameters()),
                "encoder": encoding_parameters(model)}  # fmt: skip

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion and penalty; ``adversarial``, the encoder's loss, and what the ``critic`` minimises."""
        draw = model.draw(batch.x, noise=noise)
        codes = draw.z[0][0]
        return {
            "distortion": -draw.log_px.mean(0),
            "penalty": draw.penalty,
            "adversarial": self._fooling(networks, codes),
            "critic": self._telling(model, networks, codes, noise),
        }

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Distortion + the encoder's loss + penalty."""
        return means["distortion"] + means["adversarial"] + means["penalty"]

    def losses(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """Reconstruction; then critic and encoder, on codes of the encoder as it is by then."""
        draw = model.draw(batch.x, noise=noise)
        means = {"distortion": -draw.log_px.mean(), "penalty": draw.penalty.mean()}
        yield "autoencoder", means["distortion"] + means["penalty"]
        z, _ = cast("Posterior", model.posterior(batch.x)).rsample_and_log_prob((1,), noise)
        codes = z[0]
        means["critic"] = self._telling(model, networks, codes, noise).mean()
        yield "critic", means["critic"]
        means["adversarial"] = self._fooling(networks, codes).mean()
        yield "encoder", means["adversarial"]
        return self.record(self.loss(means), means)

    def _fooling(self, networks: ModuleDict, codes: Tensor) -> Tensor:
        from torch.nn.functional import softplus

        return softplus(-networks["critic"](codes).float())

    def _telling(self, model: VAE, networks: ModuleDict, codes: Tensor, noise: Noise) -> Tensor:
        wanted = cast("PriorDistribution", model.prior()).rsample_from(noise, len(codes))
        critic = networks["critic"]
        return _telling(critic(wanted.detach()).float(), critic(codes.detach()).float())


@final
@dataclass(frozen=True)
class VAEGAN(Objective):
    r"""A VAE that compares images by a critic's features, while the critic learns to tell them from data.

    With f(x) the critic's features, and the mean of p(x|z) called :math:`\hat x` for z from the posterior and
    :math:`\tilde x` for z from the prior: the encoder minimises :math:`D_{KL} + S`, where :math:`S = \frac12 |f(x) -
    f(\hat x)|^2`; the decoder :math:`\gamma S - \log D(\hat x) - \log D(\tilde x)`; the critic :math:`-\log D(x) - \log
    (1 - D(\hat x)) - \log (1 - D(\tilde x))`. All three gradients are taken before any step.

    Args:
        gamma: the decoder's weight on similarity; the sum S grows with the number of features.

    Raises:
        TypeError: for a posterior without a density.
        UsageError: for a likelihood whose decoder learns more than mean images.

    Note:
        The critic is the encoder's architecture with one linear output; its features are all that the encoder would
        emit. The decoder maximises log D of its images where the paper's minimises log (1 - D), for the gradient that
        does not vanish (Goodfellow et al. 2014, section 3). The paper gives no gamma; the default is ours. A prior that
        learns goes with the encoder, whose loss holds the rate; a likelihood's own parameters (a learned sigma), which
        no image depends on, follow the distortion, in a group of their own. Monitored is rate + S, the encoder's loss,
        under features that change: it compares epochs of one run only loosely.

    Reference:
        Larsen et al. (2016), Autoencoding beyond pixels using a learned similarity metric, algorithm 1.
        https://arxiv.org/abs/1512.09300
    """

    word: ClassVar[str] = "vae-gan"
    terms: ClassVar[tuple[str, ...]] = ("distortion", "rate", "similarity", "decoder", "critic")
    gamma: float = option(1.0, "the decoder's weight on the similarity of features")

    def networks(self, model: VAE) -> ModuleDict:
        """The critic of images: features by the encoder's architecture, and the verdict on them."""
        from torch.nn import Linear, ModuleDict

        features = model.encoder.spec.build(model.shape)
        return ModuleDict({"features": features, "verdict": Linear(features.out_features, 1)})

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Encoder and prior; decoder; critic; the likelihood's own parameters, if it has any."""
        if model.likelihood_head.params_per_channel > 1:
            word = model.likelihood_head.spec.word
            raise UsageError(f"--objective vae-gan compares mean images, and the decoder of --likelihood {word} learns "
                             "more than these: take --likelihood gaussian")  # fmt: skip
        groups = {
            "encoder": [*encoding_parameters(model), *model.prior_part.parameters()],
            "decoder": list(model.decoder.parameters()),
            "critic": list(networks.parameters()),
            "likelihood": list(model.likelihood_head.parameters()),
        }
        return {name: group for name, group in groups.items() if group}

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """Distortion, rate and penalty; the ``similarity`` S, and what ``decoder`` and ``critic`` minimise."""
        from torch.nn.functional import softplus

        draw = model.draw(batch.x, noise=noise)
        wanted = cast("PriorDistribution", draw.pz).rsample_from(noise, len(batch.x)).detach()
        restored, drawn = (model.likelihood(z).mean for z in (draw.z[0][0], wanted))
        features = [networks["features"](x).float() for x in (batch.x, restored, drawn)]
        real, *made = (networks["verdict"](f).float().squeeze(1) for f in features)
        similarity = 0.5 * (features[0] - features[1]).square().sum(1)
        fooling = softplus(-made[0]) + softplus(-made[1])
        return {
            **common_parts(draw),
            "similarity": similarity,
            "decoder": self.gamma * similarity + fooling,
            "critic": softplus(-real) + softplus(made[0]) + softplus(made[1]),
        }

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Rate + similarity + penalty."""
        return means["rate"] + means["similarity"] + means["penalty"]

    def losses(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """All groups, of one draw."""
        means = means_of(self.parts(model, networks, batch, noise))
        loss = self.loss(means)
        of_group = {"encoder": loss, "decoder": means["decoder"], "critic": means["critic"],
                    "likelihood": means["distortion"]}  # fmt: skip
        names = tuple(self.groups(model, networks))
        yield names, tuple(of_group[name] for name in names)
        return self.record(loss, means)


def _critic_of_codes(latent_dim: int, hidden_dims: Sequence[int]) -> ModuleDict:
    """A fully connected network that maps codes (B, D) to logits (B,), with the slope 0.2 below zero."""
    from torch.nn import Flatten, LeakyReLU, Linear, ModuleDict, Sequential

    dims = [latent_dim, *hidden_dims]
    pairs = zip(dims[:-1], dims[1:], strict=True)
    hidden = [layer for fan_in, fan_out in pairs for layer in (Linear(fan_in, fan_out), LeakyReLU(0.2))]
    return ModuleDict({"critic": Sequential(*hidden, Linear(dims[-1], 1), Flatten(0))})


def _telling(first: Tensor, second: Tensor) -> Tensor:
    """The cross-entropy (B,) of a critic that is to give the first logits a 1 and the second a 0, in nats."""
    from torch.nn.functional import softplus

    return 0.5 * (softplus(-first) + softplus(second))
