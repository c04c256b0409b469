"""Schedules: pure functions of the step, composed from five pieces.

A schedule maps a step (0, 1, 2, ...) to a float: a learning rate, a weight on the KL, a temperature. It has no state,
so a resumed run needs nothing but its step. (ReduceLROnPlateau is no schedule: it depends on the validation curve, and
its state is part of the checkpoint.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """Return ``value`` at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: float) -> Schedule:
    """Go from ``start`` at step 0 to ``end`` at ``steps`` in a straight line, and stay there.

    Example:
        >>> [linear(0.0, 1.0, steps=4)(t) for t in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    return lambda step: end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, steps: float) -> Schedule:
    r"""Go from ``start`` to ``end`` along half a cosine: :math:`e + (s - e)(1 + \cos(\pi t / T)) / 2`; stay at ``end``.

    Reference:
        Loshchilov & Hutter (2017), SGDR: Stochastic Gradient Descent with Warm Restarts, eq. 5.
        https://arxiv.org/abs/1608.03983
    """
    return lambda step: end if step >= steps else end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def cyclic(low: float, high: float, period: float) -> Schedule:
    """Rise from ``low`` to ``high`` and fall back, in straight lines, once each ``period`` steps.

    Reference:
        Smith (2017), Cyclical Learning Rates for Training Neural Networks, section 3.1. https://arxiv.org/abs/1506.01186

    Example:
        >>> [cyclic(1.0, 3.0, period=4)(t) for t in range(6)]
        [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    """
    return lambda step: low + (high - low) * (1 - abs(2 * (step % period) / period - 1))


def join(first: Schedule, then: Schedule, at: float) -> Schedule:
    """Follow ``first`` before step ``at``; from there on ``then``, which counts its own steps from 0.

    Example:
        >>> warm_up_then_decay = join(linear(0.0, 1.0, 10), cosine(1.0, 0.0, 90), at=10)
        >>> warm_up_then_decay(10), warm_up_then_decay(100)
        (1.0, 0.0)
    """
    return lambda step: first(step) if step < at else then(step - at)
