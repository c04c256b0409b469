"""Learning from the true posterior, of which Markov chains draw samples.

Shapes: B batch, D latent dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast, final

from vaelab.errors import UsageError
from vaelab.objectives.objective import Losses, Parts, means_of
from vaelab.objectives.wake_sleep import Scored
from vaelab.specs.spec import positive

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch
    from vaelab.priors import PriorDistribution
    from vaelab.runtime import Noise

ACCEPTANCE = 0.9  # of transitions, which the step size is led to: Kingma & Welling (2014), appendix E
_GAIN = 0.05  # of the step size's logarithm, a batch and unit of acceptance


@final
@dataclass(frozen=True)
class MCEM(Scored):
    r"""Monte Carlo EM: :math:`z \sim p_\theta(z|x)` by Hamiltonian Monte Carlo, then steps up
    :math:`\log p_\theta(x, z)`.

    Each training image has a chain, which begins at a draw of the prior. When it is the image's turn, the chain takes
    one transition of ``num_leapfrog`` leapfrog steps, and the decoder ``weight_steps`` steps with the state that it
    has come to; the step size is led to 90 % accepted transitions. No bound is involved, and no encoder.

    The encoder learns all the same, :math:`\max_\phi \log q_\phi(z|x)` of these states, beside the decoder and without
    a say in what that learns, so that the trained model has codes and a likelihood by importance sampling.

    Recorded of training are distortion and rate of the chains' states, together an upper bound on log p(x) with its
    sign turned (in expectation, once the chains have converged); monitored is the negative ELBO of the encoder.

    Raises:
        TypeError: for a posterior that cannot score codes other than its own.
        UsageError: for latents that do not fill R^D, and for a prior that is made of the encoder.

    Note:
        Not on-line: an image that comes once never leaves the prior. A batch costs as much as 10 + 5 of another
        objective, and is no compiled step. The chains are kept in the checkpoint, and by one process. They move under
        the decoder as it is evaluated, and of an image as it comes: where that changes (``--protocol dynamic``,
        augmentation), or weights step under dropout or batch norm, they are always a transition behind.

    Reference:
        Wei & Tanner (1990), A Monte Carlo implementation of the EM algorithm. https://doi.org/10.2307/2290005
        Kingma & Welling (2014), section 5 and appendix E. https://arxiv.org/abs/1312.6114
        Naesseth, Lindsten & Blei (2020), Markovian score climbing (how the encoder learns).
        https://arxiv.org/abs/2003.10374
    """

    word: ClassVar[str] = "mcem"
    descends: ClassVar[bool] = False  # codes leave the prior before the encoder knows them
    remembers: ClassVar[bool] = True
    num_leapfrog: int = positive(10, "leapfrog steps of a transition")
    weight_steps: int = positive(5, "steps of the weights a batch")

    def networks(self, model: VAE) -> ModuleDict:
        """The chains: nothing that is learned, but what has to be kept."""
        from torch.nn import ModuleDict

        from vaelab.objectives.memory import Chains

        return ModuleDict({"chains": Chains(model.latent_dim)})

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Encoder and decoder."""
        if model.space != "real":
            raise UsageError("--objective mcem moves codes along gradients, in R^D: choose another posterior "
                             "(--posterior diagonal-normal)")  # fmt: skip
        return super().groups(model, networks)

    def losses(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """Move the chains, then step with where they are."""
        z = self._moved(model, networks, batch, noise)
        means: Parts = {}
        for _ in range(self.weight_steps):
            log_px, log_pz = model.log_px(batch.x, z[None])[0], model.prior().log_prob(z)
            log_qz = self.score(model.posterior(batch.x), z)
            means = means or means_of({"distortion": -log_px, "rate": log_qz - log_pz})
            yield ("decoder", "encoder"), (-(log_px + log_pz).mean(), -log_qz.mean())
        return self.record(self.loss(means), means)

    def _moved(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Tensor:
        """One transition of the images' chains, (B, D)."""
        import torch

        from vaelab.objectives.memory import Chains
        from vaelab.runtime import eval_mode
        from vaelab.samplers import hamiltonian

        chains = cast(Chains, networks["chains"])
        # In training mode dropout would change the density on the way, and one chain depend on those beside it.
        with eval_mode(model), torch.autocast(batch.x.device.type, enabled=False), model.fixed_prior():
            pz, size = model.prior(), len(batch.x)
            start = chains.of(batch.index, cast("PriorDistribution", pz).rsample_from(noise, size).detach())
            z, probability = hamiltonian(
                lambda z: model.log_px(batch.x, z[None])[0] + pz.log_prob(z), start, chains.log_eps.exp(),
                noise.normal("momentum", start.shape), noise.uniform("transition", (size, 2)).mT, self.num_leapfrog,
            )  # fmt: skip
        chains.keep(batch.index, z)
        chains.log_eps += _GAIN * (probability.mean() - ACCEPTANCE)
        return z
