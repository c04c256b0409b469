"""Learning rules: what is minimised, and what of it is monitored.

An objective is a frozen dataclass whose fields are its configuration; it owns no state. This file imports torch only
inside functions, so that recipes can be listed without it.

Shapes: K samples, B batch, L latent layers, N data set.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, TypeVar, Union, final

from vaelab import schedules
from vaelab.specs import option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.nn import Module, ModuleDict, Parameter

    from vaelab.models import Batch, LatentVariableModel
    from vaelab.runtime import Noise

Number = TypeVar("Number", "Tensor", "NDArray[np.float64]", float)  # a term: of a batch, of every example, or a mean
Group = str | tuple[str, ...]
Loss = Union["Tensor", "tuple[Tensor, ...]"]
Losses = Generator[tuple[Group, Loss], None, "dict[str, Tensor]"]


class Objective(Protocol):
    """A learning rule. Its weights may follow a schedule; ``at`` freezes them for one step."""

    @property
    def annealing_epochs(self) -> float:
        """Epochs after which the weights no longer change; best model and early stopping count from there."""
        ...

    def at(self, epoch: float) -> Self:
        """This objective with its scheduled weights at ``epoch`` (fractional: step / steps per epoch)."""
        ...

    def networks(self, model: LatentVariableModel) -> ModuleDict:
        """What the objective itself learns (a critic); empty for most."""
        ...

    def groups(self, model: Module, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Which parameters each yielded loss trains."""
        ...

    def losses(self, model: LatentVariableModel, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """Lazily yield ``(group, loss)``, one optimizer step each; return the batch means to record, in nats.

        Groups that share one draw are yielded together, ``((group, ...), (loss, ...))``: all their gradients are taken
        before any of them steps.
        """
        ...

    def weigh(self, distortion: Number, rate: Number) -> Number:
        """The value that is minimised and monitored, from distortion and rate, in nats per example."""
        ...


@final
@dataclass(frozen=True)
class ELBO:
    r"""The evidence lower bound, with a weight on the rate: minimise :math:`-E_q[\log p(x|z)] + \beta D_{KL}(q \| p)`.

    With ``beta = 1`` its negative bounds log p(x) from below. With another it is a trade-off between distortion and
    rate (beta-VAE), not a bound; ``evaluate`` then prints both.

    Args:
        beta: the weight on the rate.
        kl_warmup_epochs: the weight rises linearly from 0 to ``beta`` over so many epochs.

    Reference:
        Kingma & Welling (2014), eq. 10. https://arxiv.org/abs/1312.6114
        Higgins et al. (2017), beta-VAE. https://openreview.net/forum?id=Sy2fzU9gl
        Bowman et al. (2016), section 3.1 (annealing). https://arxiv.org/abs/1511.06349
    """

    word: ClassVar[str] = "elbo"
    beta: float = option(1.0, "weight on the rate (the KL)")
    kl_warmup_epochs: float = option(0.0, "epochs over which that weight rises from 0")

    @property
    def annealing_epochs(self) -> float:
        """Epochs until the weight reaches ``beta``."""
        return self.kl_warmup_epochs

    def at(self, epoch: float) -> ELBO:
        """The ELBO with the weight that holds at ``epoch``."""
        beta = schedules.linear(0.0, self.beta, self.kl_warmup_epochs)(epoch)
        return replace(self, beta=beta, kl_warmup_epochs=0.0)

    def networks(self, model: LatentVariableModel) -> ModuleDict:
        """None: the ELBO learns nothing of its own."""
        from torch.nn import ModuleDict

        return ModuleDict()

    def groups(self, model: Module, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """One group: every parameter of the model."""
        return {"model": list(model.parameters())}

    def losses(self, model: LatentVariableModel, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """Yield the one loss; return its terms."""
        draw = model.draw(batch.x, noise=noise)
        distortion = -draw.log_px.mean()
        rate = draw.kl.sum(0).mean()
        loss = self.weigh(distortion, rate) + draw.penalty.mean()
        yield "model", loss
        return {"loss": loss.detach(), "distortion": distortion.detach(), "rate": rate.detach()}

    def weigh(self, distortion: Number, rate: Number) -> Number:
        """Distortion + beta * rate."""
        return distortion + self.beta * rate


def elbo_terms(
    model: LatentVariableModel, batches: Iterable[tuple[Batch, Noise]], num_samples: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distortion and rate of every example of a data set, in nats. Training and evaluation both use this one.

    Per-example values are returned, never averages of batches, so the last, smaller batch counts for what it is.

    Args:
        model: put it in ``eval()`` mode first, if dropout and batch norm should be off.
        batches: images with the noise that belongs to their rows.
        num_samples: K, over which each example's distortion is averaged.

    Returns:
        Two arrays of shape (N,).
    """
    import numpy as np
    import torch

    distortions: list[NDArray[np.float64]] = []
    rates: list[NDArray[np.float64]] = []
    with torch.no_grad():
        for batch, noise in batches:
            draw = model.draw(batch.x, num_samples=num_samples, noise=noise)
            distortions.append((-draw.log_px).mean(0).cpu().double().numpy())
            rates.append(draw.kl.sum(0).cpu().double().numpy())
    return np.concatenate([np.empty(0), *distortions]), np.concatenate([np.empty(0), *rates])
