"""Specs: what a model and its training are made of, as plain data.

A spec is a frozen dataclass whose fields are the part's whole configuration; ``spec.build(...)`` makes the part, which
keeps it as ``part.spec``. Each default is written once, here. Nothing in this file imports torch: the command line can
print its help, and recipes can be listed, without it.

Field metadata: ``help`` is the line that ``--help`` prints, ``aliases`` are other names under which a flag is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from vaelab import schedules
from vaelab.schedules import Schedule

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

Shape = tuple[int, int, int]  # channels, height, width of one image
Activation = Literal["relu", "tanh", "silu", "gelu"]


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), flag: str | None = None) -> Any:
    """Declare a field: its default, its line of help, other names, and the flag's name if it is not the field's."""
    return dataclasses.field(default=default, metadata={"help": help, "aliases": aliases, "flag": flag})


class Spec:
    """Base of all specs of model parts.

    ``part`` names the module and class that ``build`` instantiates, ``word`` is what the command line calls it.
    """

    part: ClassVar[str]
    word: ClassVar[str]

    def build(self, *shape: Any) -> Any:
        """Make the part for the given shapes. The part is ``torch.nn.Module(spec, *shape)``."""
        module, name = self.part.split(":")
        return getattr(import_module(module), name)(self, *shape)


# --- networks -------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class MLPEncoder(Spec):
    """Fully connected layers on the flattened image."""

    part: ClassVar[str] = "vaelab.networks:MLPEncoder"
    word: ClassVar[str] = "mlp"
    hidden_dims: tuple[int, ...] = option((512,), "units of each hidden layer")
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class MLPDecoder(Spec):
    """Fully connected layers from the latent vector to the parameters of every pixel."""

    part: ClassVar[str] = "vaelab.networks:MLPDecoder"
    word: ClassVar[str] = "mlp"
    hidden_dims: tuple[int, ...] = option((512,), "units of each hidden layer")
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class ConvEncoder(Spec):
    """3x3 convolutions of stride 2, each halving the image, then optional fully connected layers."""

    part: ClassVar[str] = "vaelab.networks:ConvEncoder"
    word: ClassVar[str] = "conv"
    conv_channels: tuple[int, ...] = option((32, 64, 128), "channels of each stride-2 convolution")
    hidden_dims: tuple[int, ...] = option((), "units of fully connected layers after the convolutions")
    batch_norm: bool = option(False, "batch normalisation after each convolution")
    dropout: float = option(0.0, "probability of dropping an activation")
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class ConvDecoder(Spec):
    """Optional fully connected layers, then 3x3 transposed convolutions of stride 2 back to the exact image size.

    ``conv_channels`` is in the order of the flow: (128, 64, 32) ends in an image made from 32 channels.
    """

    part: ClassVar[str] = "vaelab.networks:ConvDecoder"
    word: ClassVar[str] = "conv"
    conv_channels: tuple[int, ...] = option((128, 64, 32), "channels that enter each transposed convolution")
    hidden_dims: tuple[int, ...] = option((), "units of fully connected layers before the convolutions")
    batch_norm: bool = option(False, "batch normalisation after each transposed convolution but the last")
    activation: Activation = option("relu", "non-linearity between layers")


# --- distributions --------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class DiagonalNormal(Spec):
    """Approximate posterior with independent normal latents: q(z|x) = N(loc(x), diag(scale(x)^2))."""

    part: ClassVar[str] = "vaelab.posteriors:DiagonalNormal"
    word: ClassVar[str] = "diagonal-normal"
    latent_dim: int = option(20, "number of latent dimensions", aliases=("z_dim",))


@final
@dataclass(frozen=True)
class StandardNormal(Spec):
    """Prior p(z) = N(0, I)."""

    part: ClassVar[str] = "vaelab.priors:StandardNormal"
    word: ClassVar[str] = "standard-normal"


@final
@dataclass(frozen=True)
class Bernoulli(Spec):
    """Likelihood of binary pixels, computed from logits; on grey pixels a cross-entropy, not a likelihood."""

    part: ClassVar[str] = "vaelab.likelihoods:Bernoulli"
    word: ClassVar[str] = "bernoulli"


@final
@dataclass(frozen=True)
class Gaussian(Spec):
    """Likelihood of real-valued pixels: N(mean(z), sigma^2), one sigma for all pixels, learned or fixed."""

    part: ClassVar[str] = "vaelab.likelihoods:Gaussian"
    word: ClassVar[str] = "gaussian"
    sigma: float = option(0.3, "standard deviation of a pixel in [0, 1] (where learning starts from)")
    learn_sigma: bool = option(True, "learn sigma with the network")


# --- optimizers -----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015)."""

    word: ClassVar[str] = "adam"
    adam_betas: tuple[float, float] = option((0.9, 0.999), "decay of the gradient's first and second moments")
    adam_eps: float = option(1e-8, "added to the root of the second moment")

    def build(self, parameters: Iterable[Parameter], learning_rate: float) -> Optimizer:
        """Make the optimizer, in torch's fused form: one pass over the parameters a step."""
        from torch import optim

        return optim.Adam(parameters, learning_rate, betas=self.adam_betas, eps=self.adam_eps, fused=True)


@final
@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    word: ClassVar[str] = "adamw"
    weight_decay: float = option(1e-2, "decoupled weight decay")
    adam_betas: tuple[float, float] = option((0.9, 0.999), "decay of the gradient's first and second moments")
    adam_eps: float = option(1e-8, "added to the root of the second moment")

    def build(self, parameters: Iterable[Parameter], learning_rate: float) -> Optimizer:
        """Make the optimizer, in torch's fused form: one pass over the parameters a step."""
        from torch import optim

        return optim.AdamW(
            parameters,
            learning_rate,
            betas=self.adam_betas,
            eps=self.adam_eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


# --- learning-rate schedules ----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Constant:
    """One learning rate throughout."""

    word: ClassVar[str] = "constant"
    learning_rate: float = option(1e-3, "step size of the optimizer", aliases=("lr",))
    warmup_epochs: ClassVar[float] = 0

    def schedule(self, steps_per_epoch: int, epochs: int) -> Schedule:
        """The learning rate as a function of the step."""
        return schedules.constant(self.learning_rate)


@final
@dataclass(frozen=True)
class Plateau:
    """ReduceLROnPlateau: multiply by ``lr_factor`` when the monitored loss has not improved for ``lr_patience`` epochs.

    The rate depends on the validation curve; this schedule is where it starts from.
    """

    word: ClassVar[str] = "plateau"
    learning_rate: float = option(1e-3, "step size of the optimizer at the start", aliases=("lr",))
    lr_factor: float = option(0.5, "factor by which a plateau reduces the learning rate")
    lr_patience: int = option(3, "epochs without improvement that make a plateau")
    min_lr: float = option(1e-5, "the learning rate is never reduced below this")
    warmup_epochs: ClassVar[float] = 0

    def schedule(self, steps_per_epoch: int, epochs: int) -> Schedule:
        """The learning rate before any reduction."""
        return schedules.constant(self.learning_rate)


@final
@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from ``base_lr`` to ``max_lr``, then half a cosine back to ``base_lr`` at the last step."""

    word: ClassVar[str] = "warmup-cosine"
    base_lr: float = option(1e-4, "learning rate at the first and at the last step")
    max_lr: float = option(1e-3, "learning rate at the end of the warm-up")
    warmup_epochs: float = option(1, "epochs over which the learning rate rises")

    def schedule(self, steps_per_epoch: int, epochs: int) -> Schedule:
        """The learning rate as a function of the step. A warm-up longer than the run is cut to the run."""
        warmup = min(self.warmup_epochs, epochs) * steps_per_epoch
        rise = schedules.linear(self.base_lr, self.max_lr, warmup)
        fall = schedules.cosine(self.max_lr, self.base_lr, epochs * steps_per_epoch - warmup)
        return schedules.join(rise, fall, at=warmup)


@final
@dataclass(frozen=True)
class Cyclic:
    """Triangular cycles between ``base_lr`` and ``max_lr``."""

    word: ClassVar[str] = "cyclic"
    base_lr: float = option(1e-4, "lowest learning rate of a cycle")
    max_lr: float = option(1e-3, "highest learning rate of a cycle")
    cycle_epochs: float = option(8, "epochs of one cycle, up and down")
    warmup_epochs: ClassVar[float] = 0

    def schedule(self, steps_per_epoch: int, epochs: int) -> Schedule:
        """The learning rate as a function of the step."""
        return schedules.cyclic(self.base_lr, self.max_lr, self.cycle_epochs * steps_per_epoch)
