"""Specs of optimizers, and of their learning rate as a function of the step."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, final

from vaelab import schedules
from vaelab.schedules import Schedule
from vaelab.specs.spec import option, positive

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

OptimizerT = TypeVar("OptimizerT", bound="Optimizer")


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015)."""

    word: ClassVar[str] = "adam"
    adam_betas: tuple[float, float] = option((0.9, 0.999), "decay of the gradient's first and second moments", below=1)
    adam_eps: float = option(1e-8, "added to the root of the second moment")

    def build(self, parameters: Iterable[Parameter], learning_rate: float) -> Optimizer:
        """Make torch's optimizer of this name and settings, in its fused form: one pass over the parameters a step."""
        settings = {field.name.removeprefix("adam_"): getattr(self, field.name) for field in dataclasses.fields(self)}
        return _of_torch(type(self).__name__, parameters, learning_rate, fused=True, **settings)


@final
@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    word: ClassVar[str] = "adamw"
    weight_decay: float = option(1e-2, "decoupled weight decay")


@final
@dataclass(frozen=True)
class Adagrad:
    """Adagrad (Duchi, Hazan & Singer 2011): steps that shrink with the root of the sum of all squared gradients."""

    word: ClassVar[str] = "adagrad"
    weight_decay: float = option(0.0, "added to the gradient, times the weights: 1/N images is the prior N(0, I)")

    def build(self, parameters: Iterable[Parameter], learning_rate: float) -> Optimizer:
        """Make torch's optimizer; in its fused form where there is one, on a CPU and CUDA."""
        parameters = list(parameters)
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        return _of_torch("Adagrad", parameters, learning_rate, fused=fused, weight_decay=self.weight_decay)


def _of_torch(name: str, parameters: Iterable[Parameter], learning_rate: float, **settings: Any) -> Optimizer:
    from torch import optim

    return without_compiler(getattr(optim, name))(parameters, lr=learning_rate, **settings)


def without_compiler(kind: type[OptimizerT]) -> type[OptimizerT]:
    """Make torch's optimizer one that does not load torch's compiler: a second and 70 MiB of every training.

    torch wraps some methods of its optimizers, so that its compiler stops at them, and imports it to do so. No compiler
    looks at these here, and what is wrapped is taken by itself.
    """
    import torch

    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(cast(Any, kind).step))
    return cast("type[OptimizerT]", type(kind.__name__, (kind,), methods))


@final
@dataclass(frozen=True)
class Constant:
    """One learning rate throughout."""

    word: ClassVar[str] = "constant"
    learning_rate: float = positive(1e-3, "step size of the optimizer", aliases=("lr",))
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
    learning_rate: float = positive(1e-3, "step size of the optimizer at the start", aliases=("lr",))
    lr_factor: float = option(0.5, "factor by which a plateau reduces the learning rate", below=1)
    lr_patience: int = positive(3, "epochs without improvement that make a plateau")
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
    max_lr: float = positive(1e-3, "learning rate at the end of the warm-up")
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
    max_lr: float = positive(1e-3, "highest learning rate of a cycle")
    cycle_epochs: float = positive(8, "epochs of one cycle, up and down")
    warmup_epochs: ClassVar[float] = 0

    def schedule(self, steps_per_epoch: int, epochs: int) -> Schedule:
        """The learning rate as a function of the step."""
        return schedules.cyclic(self.base_lr, self.max_lr, self.cycle_epochs * steps_per_epoch)
