"""What a learning rule is, and what of it can be read off a data set.

An objective is a frozen dataclass whose fields are its configuration; it owns no state. Nothing here imports torch
before it computes, so that recipes can be listed without it.

Shapes: K samples, B batch, L latent layers, N data set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar, Union

from vaelab.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch, Draw
    from vaelab.runtime import Noise

Number = TypeVar("Number", "Tensor", "NDArray[np.float64]", float)  # a term: of a batch, of every example, or a mean
Group = str | tuple[str, ...]
Loss = Union["Tensor", "tuple[Tensor, ...]"]
Losses = Generator[tuple[Group, Loss], None, "dict[str, Tensor]"]
Parts = dict[str, "Tensor"]


@dataclass(frozen=True)
class Objective(ABC):
    """A learning rule: parts that each example has, and a loss of their means.

    The loss is a function of means, not a mean of losses, so that rules that look at a whole batch (a capacity, free
    bits, a covariance) mean the same on a batch and on a data set: what is monitored is ``loss`` of the validation
    means. Most rules are ``parts`` and ``loss`` alone; one that trains several groups says how in ``shares`` or
    ``losses``.
    """

    word: ClassVar[str]
    terms: ClassVar[tuple[str, ...]] = ("distortion", "rate")  # parts that are recorded, in nats per example
    in_batch: ClassVar[bool] = False  # a part of one example depends on those beside it: a batch's size counts
    holds_a_prior: ClassVar[bool] = True  # codes are led to the prior, so that its draws are places they lie in
    descends: ClassVar[bool] = True  # the loss that is recorded of training falls from the first epoch on
    remembers: ClassVar[bool] = False  # it keeps something of each training image, which processes do not share
    samples: ClassVar[bool] = False  # it draws images, and so from torch's global generator: its numbers are seeded
    beta = 1.0  # the weight on the rate, for records; a field where it can be chosen

    @property
    def annealing_epochs(self) -> float:
        """Epochs after which the weights no longer change; best model and early stopping count from there."""
        return 0.0

    def at(self, epoch: float) -> Self:
        """This objective with its scheduled weights at ``epoch`` (fractional: step / steps per epoch)."""
        return self

    def networks(self, model: VAE) -> ModuleDict:
        """What the objective itself learns (a critic), or keeps of images; empty for most."""
        from torch.nn import ModuleDict

        return ModuleDict()

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Which parameters each yielded loss trains; one group of all the model's for most."""
        return {"model": list(model.parameters())}

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """What the loss is made of, for each example: tensors with B rows, in nats; never NaN for a sound model.

        Distortion, rate and the posterior's penalty for most.

        Raises:
            TypeError: if the model's parts have not what the rule needs (a density, one for each dimension, ...).
        """
        return common_parts(model.draw(batch.x, noise=noise))

    @abstractmethod
    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """What is minimised and monitored, from the means of the parts over examples; in nats per example."""

    def losses(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Losses:
        """Lazily yield ``(group, loss)``, one optimizer step each; return the batch means to record.

        Groups that share one draw are yielded together, ``((group, ...), (loss, ...))``: all their gradients are taken
        before any of them steps.
        """
        means = means_of(self.parts(model, networks, batch, noise))
        loss = self.loss(means)
        yield self.shares(loss, means)
        return self.record(loss, means)

    def shares(self, loss: Tensor, means: Mapping[str, Tensor]) -> tuple[Group, Loss]:
        """What each group is trained by, where all share one draw; the model by the loss for most."""
        return "model", loss

    def record(self, loss: Tensor, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss and the terms, cut from the graph."""
        return {"loss": loss.detach(), **{name: means[name].detach() for name in self.terms}}


def means_of(parts: Parts) -> Parts:
    """The mean of each part over the examples."""
    return {name: part.mean(0) for name, part in parts.items()}


def common_parts(draw: Draw) -> Parts:
    """What every draw has: distortion, rate and the posterior's penalty of each example, in nats, each (B,)."""
    return {"distortion": -draw.log_px.mean(0), "rate": draw.kl.sum(0), "penalty": draw.penalty}


def encoding_parameters(model: VAE) -> list[Parameter]:
    """The parameters of q(z|x): encoder and head."""
    return [*model.encoder.parameters(), *model.posterior_head.parameters()]


def two_sides(model: VAE, word: str) -> dict[str, list[Parameter]]:
    """The groups ``encoder`` and ``decoder``, of what makes q(z|x) and p(x, z).

    Raises:
        UsageError: for a prior that is made of the encoder: its parameters would stand on both sides.
    """
    if model.prior_part.is_encoded:
        raise UsageError(f"--objective {word} trains encoder and decoder apart, and this prior is made of both: "
                         "choose another (--prior standard-normal, or --objective iwae)")  # fmt: skip
    decoding = [*model.prior_part.parameters(), *model.likelihood_head.parameters(), *model.decoder.parameters()]
    return {"encoder": encoding_parameters(model), "decoder": decoding}


def require_fixed_prior(model: VAE, word: str) -> None:
    """Refuse a prior that learns, for an objective in which nothing would train it.

    Raises:
        UsageError: naming the objective, and what to choose.
    """
    if list(model.prior_part.parameters()):
        raise UsageError(f"--objective {word} leads the codes to a prior that stays as it is, and this one learns: "
                         "choose another (--prior standard-normal)")  # fmt: skip


def sum_parts(
    objective: Objective, model: VAE, networks: ModuleDict, batches: Iterable[tuple[Batch, Noise]], sums: Parts
) -> Parts:
    """Add an objective's parts of all examples of some batches to ``sums``, in float64.

    Args:
        objective: at the weights that count.
        model, networks: put them in ``eval()`` mode first, if dropout and batch norm should be off.
        batches: images with the noise that belongs to their rows.
        sums: of each part, what there is so far; zeros to begin with, on a device that has float64.
    """
    import torch

    sums = dict(sums)
    with torch.no_grad(), model.fixed_prior():
        for batch, noise in batches:
            for name, part in objective.parts(model, networks, batch, noise).items():
                sums[name] = sums[name] + part.to(sums[name].device).double().sum(0)
    return sums


def elbo_terms(
    model: VAE, batches: Iterable[tuple[Batch, Noise]], num_samples: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distortion and rate of every example of a data set, in nats.

    Per-example values are returned, never averages of batches, so the last, smaller batch counts for what it is.

    Args:
        model: put it in ``eval()`` mode first, if dropout and batch norm should be off.
        batches: images with the noise that belongs to their rows.
        num_samples: K, over which each example's distortion is averaged.

    Returns:
        Two arrays of shape (N,).

    Raises:
        TypeError: if the model has no rate, as its posterior has no density.
    """
    distortion, rate = terms_as_defined(model, batches, num_samples)
    if rate is None:
        raise TypeError("the rate is undefined for this model: posterior or prior has no density")
    return distortion, rate


def terms_as_defined(
    model: VAE, batches: Iterable[tuple[Batch, Noise]], num_samples: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """``elbo_terms``, with None in place of the rate for a model that has none."""
    import numpy as np
    import torch

    distortions: list[NDArray[np.float64]] = []
    rates: list[NDArray[np.float64]] = []
    undefined = False
    with torch.no_grad(), model.fixed_prior():
        for batch, noise in batches:
            draw = model.draw(batch.x, num_samples=num_samples, noise=noise)
            distortions.append((-draw.log_px).mean(0).cpu().double().numpy())
            try:
                rates.append(draw.kl.sum(0).cpu().double().numpy())
            except TypeError:
                undefined = True
    return np.concatenate([np.empty(0), *distortions]), None if undefined else np.concatenate([np.empty(0), *rates])
