"""What becomes of weights after their gradients: an optimizer's step that can be traced, and a moving average."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class CannotCompileError(Exception):
    """An objective or an optimizer that the compiled step cannot carry; the message says which."""


def _is_torchs_adam(optimizer: Optimizer) -> bool:
    """Whether it takes the step of torch's Adam or AdamW, and no other of the same base."""
    taken = inspect.unwrap(type(optimizer).step)
    return isinstance(optimizer, Adam) and taken in (inspect.unwrap(Adam.step), inspect.unwrap(AdamW.step))


@final
class AdamUpdate:
    r"""The step of torch's ``Adam`` and ``AdamW`` as operations that can be traced, on the optimizers' own state.

    :math:`m \leftarrow \beta_1 m + (1 - \beta_1) g`, :math:`v \leftarrow \beta_2 v + (1 - \beta_2) g^2`,
    :math:`\theta \leftarrow (1 - \eta \lambda) \theta - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)`, with
    :math:`\hat m = m / (1 - \beta_1^t)` and :math:`\hat v = v / (1 - \beta_2^t)`.

    Args:
        optimizers: of each group.
        clip_norm: the largest norm of a group's gradient, as in torch's ``clip_grad_norm_``; None does not clip.

    Raises:
        CannotCompileError: for another optimizer, or one whose parameters have not all taken the same steps.

    Reference:
        Kingma & Ba (2015), Adam, algorithm 1. https://arxiv.org/abs/1412.6980
        Loshchilov & Hutter (2019), Decoupled Weight Decay Regularization, algorithm 2.
        https://arxiv.org/abs/1711.05101
    """

    def __init__(self, optimizers: dict[str, Optimizer], clip_norm: float | None) -> None:
        self._clip_norm = clip_norm
        self._settings: dict[str, dict[str, Any]] = {}
        self._moments: dict[str, list[Tensor]] = {name: [] for name in optimizers}
        steps: list[Tensor] = []
        for name, optimizer in optimizers.items():
            settings = optimizer.param_groups[0]
            if (
                not _is_torchs_adam(optimizer) or len(optimizer.param_groups) > 1
                or settings["amsgrad"] or settings["maximize"]
                or (settings["weight_decay"] and not settings["decoupled_weight_decay"])
            ):  # fmt: skip
                raise CannotCompileError(f"{type(optimizer).__name__} with these settings")
            self._settings[name] = settings
            for parameter in settings["params"]:
                state = optimizer.state[parameter]
                if not state:  # what torch's own first step makes
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self._moments[name] += [state["exp_avg"], state["exp_avg_sq"]]
                steps.append(state["step"])
        if len({int(step) for step in steps}) > 1:
            raise CannotCompileError("parameters that have taken different numbers of steps")
        self.taken = int(steps[0])
        self.steps = steps
        self.clips = clip_norm is not None

    @property
    def state(self) -> list[Tensor]:
        """What a step changes besides parameters: m and v of each, and the counts of steps."""
        return [*itertools.chain(*self._moments.values()), *self.steps]

    def moments(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """All m and all v of a group's parameters."""
        return self._moments[name][::2], self._moments[name][1::2]

    def numbers(self) -> list[Tensor]:
        """Of each group, what depends on the step: its size, what the root of v is to be multiplied by, the decay."""
        return [self._numbers(settings) for settings in self._settings.values()]

    def _numbers(self, settings: dict[str, Any]) -> Tensor:
        rate, (first, second), t = settings["lr"], settings["betas"], self.taken + 1
        numbers = rate / (1 - first**t), (1 - second**t) ** -0.5, 1 - rate * settings["weight_decay"]
        return on_device(torch.tensor(numbers), self.steps[0].device)

    @torch.no_grad()
    def __call__(
        self,
        groups: dict[str, list[Tensor]],
        gradients: dict[str, list[Tensor]],
        given: list[Tensor],
        squares: Tensor | None = None,
    ) -> Tensor:
        """Change parameters, moments and step counts in place.

        Args:
            groups: the parameters, or parts of them.
            gradients: theirs.
            given: m and v of each, the counts of steps, and ``numbers()``.
            squares: (G,) of each group's gradient the sum of squares, where those given are parts of it.

        Returns:
            The largest norm of a group's gradient; 0 if they are not clipped.
        """
        count = 2 * sum(map(len, groups.values()))
        moments, steps, numbers = iter(given[:count]), given[count : -len(groups)], given[-len(groups) :]
        norms = [given[0].new_zeros(())]
        for i, ((name, parameters), (size, unbias, keep)) in enumerate(zip(groups.items(), numbers, strict=True)):
            settings, found = self._settings[name], gradients[name]
            if self._clip_norm is not None:
                square = squares_of(found) if squares is None else squares[i]
                norms.append(square.sqrt())
                scale = (self._clip_norm / (norms[-1] + 1e-6)).clamp(max=1.0)
                found = [gradient * scale for gradient in found]
            first, second = settings["betas"]
            for parameter, gradient in zip(parameters, found, strict=True):
                m, v = next(moments), next(moments)
                m.lerp_(gradient, 1 - first)
                v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
                parameter.mul_(keep).sub_(size * m / (v.sqrt() * unbias + settings["eps"]))
        for step in steps:
            step.add_(1)
        return torch.stack(norms).amax()


@final
class MovingAverage(AveragedModel):
    r"""A copy of a model whose weights follow its: :math:`\bar\theta \leftarrow d \bar\theta + (1 - d)\, \theta`.

    The first step copies them, and buffers (running means) are always the model's own. The same numbers as
    ``AveragedModel``'s, which looks for the weights anew each step: more work than the averaging of a small network.

    Args:
        model: whose weights are averaged; they stay the same tensors.
        decay: d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._follow = get_ema_multi_avg_fn(decay)
        self._weights = tuple(self.module.parameters()), tuple(model.parameters())
        self._running = list(zip(self.module.buffers(), model.buffers(), strict=True))

    def update_parameters(self, model: nn.Module) -> None:
        """Take one step towards the model, which is the one that it was made of."""
        if self.n_averaged == 0:
            super().update_parameters(model)
            return
        self._follow(*self._weights, self.n_averaged)
        for ours, theirs in self._running:
            ours.copy_(theirs)
        self.n_averaged += 1


def squares_of(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of squares of a group's gradient."""
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Some numbers of the host on the device, without waiting for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
