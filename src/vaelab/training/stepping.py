"""How a training step is taken: plainly, or by one compiled function.

``PlainStep`` is the reference: autograd and torch's optimizers, for every objective. ``CompiledStep`` traces it and
lets torch's compiler fuse what lies between the matrix products: the same numbers, up to rounding, in fewer passes over
memory. Both are called once a step and return the terms that are recorded.

Shapes: B batch, G groups of parameters, T terms.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from vaelab.models import VAE, Batch
from vaelab.objectives import Group, Loss, Objective
from vaelab.processes.distributed import Team, mean_of
from vaelab.processes.sharing import SharedMemory
from vaelab.runtime import Noise
from vaelab.training.activations import TANH
from vaelab.training.batchnorm import BATCH_NORM
from vaelab.training.compiling import compile_errors, compile_graph, reason
from vaelab.training.products import faster_convolutions, faster_products
from vaelab.training.tracing import GivenNoise, Request, Weights
from vaelab.training.updates import AdamUpdate, CannotCompileError, squares_of

log = logging.getLogger("vaelab")

COMMON = 3  # kinds of values that processes have in common: weights, and Adam's two moments

Descend = Callable[[Sequence[str]], Tensor]

Step = Callable[[Objective, Batch, Noise], Tensor]
"""A way to take steps: takes one, and returns its terms (T,) in the order of ``term_names``."""

_Function = Callable[..., Sequence[Tensor]]
"""What the compiler makes: tensors in, tensors out."""

_Descent = Callable[[Tensor], Tensor]
"""The optimizers' step, from rows whose mean is the gradient to the largest norm of a group's."""


def term_names(objective: Objective) -> tuple[str, ...]:
    """What is recorded of every step, in nats per example."""
    return ("loss", *objective.terms, "grad_norm")


@final
@dataclass(frozen=True)
class PlainStep:
    """Autograd's backward pass and an optimizer's step, for every loss that the objective yields.

    Args:
        model, networks: what is trained: the model, and what the objective itself learns.
        groups: the parameters that each yielded loss trains.
        prepare: makes of a batch, as it lies in the data set, what the objective sees.
        autocast: makes the context in which losses are computed.
        descend: lets the optimizers of some groups, whose gradients are set, step; returns the largest norm of a
            group's gradient where it is clipped, else 0.
    """

    model: VAE
    networks: nn.ModuleDict
    groups: dict[str, list[nn.Parameter]]
    prepare: Callable[[Batch, Noise], Batch]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    descend: Descend

    def __call__(self, objective: Objective, batch: Batch, noise: Noise) -> Tensor:
        """Backpropagate each loss to its own group alone; several that are yielded together before any group steps."""
        losses = objective.losses(self.model, self.networks, self.prepare(batch, noise), noise)
        norms: list[Tensor] = []
        while True:
            try:
                with self.autocast():
                    names, values = _together(*next(losses))
            except StopIteration as end:
                return _stack(end.value, functools.reduce(torch.maximum, norms))
            for name in names:
                for parameter in self.groups[name]:
                    parameter.grad = None
            for i, (name, loss) in enumerate(zip(names, values, strict=True)):
                loss.backward(inputs=self.groups[name], retain_graph=i < len(names) - 1)
            norms.append(self.descend(names))


# --- the compiled step ----------------------------------------------------------------------------------------------


@final
class CompiledStep:
    """One compiled function from pixels to gradients and terms and, with ``update``, to new weights.

    The objective's own code is traced, with its noise and its scheduled weights as inputs, and autograd's backward pass
    with it. That happens at the first call and holds for batches of its shape, in the model's mode of that moment
    (``train``). Where it fails, one line says so and the plain way is taken.

    Args:
        plain: the way that is traced.
        update: the optimizers' step, as part of the function; None leaves it to ``plain.descend``.
        team: the processes. If they are several the optimizers' step is a second function, after averaging. Where they
            share memory, weights and moments lie there too, and each process takes the step of its own part of them,
            from what the first function of each has written.
    """

    def __init__(self, plain: PlainStep, update: AdamUpdate | None = None, team: Team | None = None) -> None:
        self.plain, self.update, self._team = plain, update, team or Team()
        self._apart = update is not None and self._team.world > 1
        memory = self._team.memory
        self._shared = memory if self._apart and memory is not None and memory.kinds == COMMON else None
        self._losses = _Losses(plain)
        self._state = {**dict(self._losses.named_parameters()), **dict(self._losses.named_buffers())}
        self._weights = Weights(plain.model.device)
        self._functions: dict[Objective, _Traced] = {}
        self._descents: dict[tuple[str, ...], _Descent] = {}
        self._failed = False

    def __call__(self, objective: Objective, batch: Batch, noise: Noise) -> Tensor:
        """Take one step by the compiled function."""
        if self._failed:
            return self.plain(objective, batch, noise)
        try:
            traced = self._traced(objective, batch)
            if batch.x.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                inputs = self._inputs(objective, batch, traced.asked, noise)
                *gradients, terms = (
                    traced.function(*inputs)
                    if traced.descend is None
                    else self._with_others(traced, traced.descend, inputs)
                )
        except (CannotCompileError, *compile_errors()) as error:
            log.warning("training steps cannot be compiled (%s): slower without", reason(error))
            self._failed = True
            if self._shared is not None:
                self._shared.release()
            return self.plain(objective, batch, noise)
        if self.update is not None:
            self.update.taken += 1
            return terms
        trained = (parameter for name in traced.names for parameter in self.plain.groups[name])
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        terms[-1] = self.plain.descend(traced.names)
        return terms

    def _with_others(self, traced: _Traced, descend: _Descent, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Take one step with the other processes, and return its terms."""
        rows = self._rows(traced.sizes)
        (terms,) = traced.function(*inputs, *self._places(rows, traced.sizes))
        self._team.exchange_(rows)
        terms[-1] = descend(rows)
        return [terms]

    def _traced(self, objective: Objective, batch: Batch) -> _Traced:
        """The function for this objective: another one where more than its weights has changed (a sample count)."""
        kind = self._weights.without(objective)
        if kind not in self._functions:
            log.info("compiling the training step: 10 to 60 s (--compile off does without)")
            self._functions[kind] = self._agreed(objective, batch)
        return self._functions[kind]

    def _inputs(
        self, objective: Objective, batch: Batch, asked: Sequence[Request], noise: Noise | None
    ) -> list[Tensor]:
        """All that a step reads; without noise, zeros in its place."""
        device = batch.x.device
        drawn = [torch.zeros(r[2], device=device) if noise is None else noise.drawn(*r) for r in asked]
        updates = [] if self._apart else self._updates()
        return [*self._state.values(), *_images(batch), *drawn, *self._weights.of(objective), *updates]

    def _updates(self) -> list[Tensor]:
        """What the optimizers' step reads besides weights and gradients."""
        return [] if self.update is None else [*self.update.state, *self.update.numbers()]

    def _descent(self) -> list[Tensor]:
        """What the optimizers' step reads where it is a function of its own, besides gradients."""
        return [*self._state.values(), *self._updates()]

    def _rows(self, sizes: Sequence[int]) -> Tensor:
        """Rows whose mean is the gradient when the processes have exchanged them (R, count)."""
        return _mark_fixed(self._team.rows(sum(sizes), next(self.plain.model.parameters())))

    def _places(self, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Where the compiled function writes the gradients: a place for each parameter, on a GPU one for all.

        CUDA graphs want what they write to begin at a multiple of 16 bytes.
        """
        own = self._team.own(rows)
        return [_mark_fixed(own)] if own.is_cuda else list(own.split(list(sizes)))

    def _agreed(self, objective: Objective, batch: Batch) -> _Traced:
        """The compiled functions; with several processes not before all have them (on a GPU: have traced them)."""
        if self._team.world == 1:
            return self._compile(objective, batch)
        traced, error = None, None
        try:
            traced = self._compile(objective, batch)
        except (CannotCompileError, *compile_errors()) as raised:
            error = raised
        if self._team.agree(error is None) and traced is not None:
            return traced
        raise error or CannotCompileError("another process cannot")

    def _compile(self, objective: Objective, batch: Batch) -> _Traced:
        names = list(self._state)
        asked: list[Request] = []
        trained: tuple[str, ...] = ()
        images, weights = _images(batch), self._weights.of(objective)

        def step(*inputs: Tensor) -> list[Tensor]:
            nonlocal trained
            given = iter(inputs)

            def take(count: int) -> list[Tensor]:
                return list(itertools.islice(given, count))

            state, pixels, drawn, rule = take(len(names)), take(len(images)), take(len(asked)), take(len(weights))
            noise = GivenNoise(asked, drawn, batch.x.device)
            groups = self._grouped(state)
            trained, gradients, terms = functional_call(
                self._losses,
                dict(zip(names, state, strict=True)),
                (self._weights.put(objective, rule), _with_images(batch, pixels), noise, groups),
            )
            found = list(itertools.chain(*gradients.values()))
            if self._shared is not None:
                trains = itertools.chain.from_iterable(groups[name] for name in gradients)
                found = [_as_it_lies(gradient, parameter) for gradient, parameter in zip(found, trains, strict=True)]
            if self.update is None:
                return [*found, _stack(terms, state[0].new_zeros(()))]
            if not self._apart:
                return [_stack(terms, self.update(groups, gradients, list(given)))]
            places = list(given)  # none in the first trace
            if len(places) == 1:
                found = [torch.cat([gradient.flatten() for gradient in found])]
            for place, gradient in zip(places, found, strict=False):
                place.copy_(gradient.flatten())
            return [_stack(terms, state[0].new_zeros(()))]

        # Traced twice: the first time tells which noise is asked for and what is trained: inputs of the second.
        device = batch.x.device
        table = {**BATCH_NORM, **TANH, **faster_convolutions(device)} if device.type == "cpu" else {}
        _graph_of(step, self._inputs(objective, batch, asked, None))
        sizes = [parameter.numel() for name in trained for parameter in self.plain.groups[name]]
        places = self._places(self._rows(sizes), sizes) if self._apart else []
        inputs = [*self._inputs(objective, batch, asked, None), *places]
        graph = _graph_of(step, inputs, table)
        faster_products(graph, batch.x.device)
        if self._apart and trained not in self._descents:
            compiled = self._compile_descent if self._shared is None else self._compile_part_of_descent
            self._descents[trained] = compiled(trained, sizes)
        return _Traced(self._made(graph, inputs), asked, trained, sizes, self._descents.get(trained))

    def _compile_descent(self, trained: Sequence[str], sizes: list[int]) -> _Descent:
        """The optimizers' step as a function."""
        update, state = cast(AdamUpdate, self.update), len(self._state)

        def descend(rows: Tensor, *inputs: Tensor) -> list[Tensor]:
            groups = self._grouped(inputs[:state])
            pieces = iter(mean_of(rows).split(sizes))
            gradients = {name: [next(pieces).view_as(p) for p in groups[name]] for name in trained}
            return [update(groups, gradients, list(inputs[state:]))]

        inputs = [self._rows(sizes), *self._descent()]
        function = self._made(_graph_of(descend, inputs), inputs)
        return lambda rows: function(rows, *self._descent())[0]

    def _compile_part_of_descent(self, trained: Sequence[str], sizes: list[int]) -> _Descent:
        """The optimizers' step of this process's part of each group, whose weights then lie in shared memory."""
        update, team, shared = cast(AdamUpdate, self.update), self._team, cast(SharedMemory, self._shared)
        groups = self.plain.groups
        kinds = zip(*((groups[name], *update.moments(name)) for name in groups), strict=True)
        common = shared.adopt(*(list(itertools.chain(*kind)) for kind in kinds))
        counts = {name: sum(parameter.numel() for parameter in group) for name, group in groups.items()}
        cuts, rows_cuts = _parts(counts, team), _parts({name: counts[name] for name in trained}, team)
        own = [[kind[cuts[name]] for kind in common] for name in groups]  # weights, m and v of each group
        weights, moments = [part[0] for part in own], [moment for part in own for moment in part[1:]]

        def squares(rows: Tensor) -> list[Tensor]:
            return [torch.stack([squares_of([mean_of(rows[:, rows_cuts[name]])]) for name in groups])]

        def descend(rows: Tensor, of_all: Tensor, *inputs: Tensor) -> list[Tensor]:
            parts = dict(zip(groups, ([weight] for weight in inputs), strict=False))
            gradients = {name: [mean_of(rows[:, rows_cuts[name]])] for name in groups}
            return [update(parts, gradients, list(inputs[len(groups) :]), of_all)]

        def inputs() -> list[Tensor]:
            return [*weights, *moments, *update.steps, *update.numbers()]

        rows, norms = self._rows(sizes), torch.zeros(len(groups))
        measure = self._made(_graph_of(squares, [rows]), [rows]) if update.clips else None
        function = self._made(_graph_of(descend, [rows, norms, *inputs()]), [rows, norms, *inputs()])

        def take(rows: Tensor) -> Tensor:
            given = norms if measure is None else torch.tensor(team.sums(*measure(rows)[0].tolist()))
            (norm,) = function(rows, given, *inputs())
            team.sums()  # nobody reads weights before all have theirs
            return norm

        return take

    def _grouped(self, state: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Of all parameters and buffers, those of each group."""
        number = {id(tensor): i for i, tensor in enumerate(self._state.values())}
        return {name: [state[number[id(p)]] for p in group] for name, group in self.plain.groups.items()}

    def _made(self, graph: GraphModule, inputs: list[Tensor]) -> _Function:
        """A traced graph, compiled for inputs like these; on a GPU at its first call."""
        # It is always called with the same tensors and batches of one shape: nothing is to be checked. The numbers of
        # dropout are to be torch's, not the compiler's.
        options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
        if not inputs[0].is_cuda:
            with torch.no_grad():
                return compile_graph(graph, inputs, options)
        options |= {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        for tensor in (*self._state.values(), *([] if self.update is None else self.update.state)):
            _mark_fixed(tensor)  # all is launched at once; what changes in place stays
        return torch.compile(graph, dynamic=False, fullgraph=True, options=options)


def _graph_of(
    function: _Function, inputs: Sequence[Tensor], table: Mapping[Any, Callable[..., Any]] | None = None
) -> GraphModule:
    """Trace a function, with what stands in the table in place of torch's operations.

    Raises:
        CannotCompileError: where values are asked for, as by a branch, or torch cannot trace it for another reason.
    """
    try:
        return make_fx(function, table, tracing_mode="fake")(*inputs)
    except CannotCompileError:
        raise
    except Exception as error:  # what is wrong without tracing too is raised again by the plain step
        raise CannotCompileError(reason(error)) from error


def _as_it_lies(value: Tensor, like: Tensor) -> Tensor:
    """A vector of the values, in the order in which those of ``like`` lie in memory."""
    return value.permute(sorted(range(like.dim()), key=like.stride, reverse=True)).reshape(-1)


def _parts(counts: Mapping[str, int], team: Team) -> dict[str, slice]:
    """Of vectors that lie one after the other, each with its count of values: this process's part of each."""
    ends = itertools.accumulate(counts.values())
    return {
        name: slice(end - count + count * team.rank // team.world, end - count + count * (team.rank + 1) // team.world)
        for (name, count), end in zip(counts.items(), ends, strict=True)
    }


def _mark_fixed(tensor: Tensor) -> Tensor:
    """On a GPU, let the compiler know that a tensor is always in this place, and may be written to."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


@final
@dataclass(frozen=True)
class _Traced:
    """What is compiled of a step.

    Args:
        function: from pixels to terms, and to gradients or new weights.
        asked: the noise that it reads.
        names: the groups that it trains.
        sizes: how many numbers each of their parameters has.
        descend: the step of their optimizers, if that is apart, from rows whose mean is the gradient; it returns the
            largest norm of a group's.
    """

    function: _Function
    asked: list[Request]
    names: tuple[str, ...]
    sizes: list[int]
    descend: _Descent | None


class _Losses(nn.Module):
    """Losses and their gradients, as a module, so that parameters and buffers can be inputs."""

    def __init__(self, plain: PlainStep) -> None:
        super().__init__()
        self.model, self.networks, self.prepare, self.autocast = (
            plain.model, plain.networks, plain.prepare, plain.autocast
        )  # fmt: skip

    def forward(
        self, objective: Objective, batch: Batch, noise: Noise, groups: dict[str, list[Tensor]]
    ) -> tuple[tuple[str, ...], dict[str, list[Tensor]], dict[str, Tensor]]:
        """Names of the groups that are trained, the gradients of each, and the terms."""
        losses = objective.losses(self.model, self.networks, self.prepare(batch, noise), noise)
        with self.autocast():
            names, values = _together(*next(losses))
        gradients = {
            name: list(torch.autograd.grad(loss, groups[name], retain_graph=True))
            for name, loss in zip(names, values, strict=True)
        }
        try:
            next(losses)
        except StopIteration as end:
            return names, gradients, end.value
        raise CannotCompileError(f"{type(objective).__name__} takes several steps of its optimizers a batch")


# --- parts of both ---------------------------------------------------------------------------------------------------


def _together(groups: Group, losses: Loss) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """What an objective yields, as tuples."""
    names = (groups,) if isinstance(groups, str) else groups
    return names, (losses,) if isinstance(losses, Tensor) else losses


def _stack(terms: dict[str, Tensor], norm: Tensor) -> Tensor:
    return torch.stack([*terms.values(), norm])


def _images(batch: Batch) -> list[Tensor]:
    return [tensor for tensor in (batch.x, batch.y, batch.index) if tensor is not None]


def _with_images(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    left = iter(tensors)
    x, y, index = (None if part is None else next(left) for part in (batch.x, batch.y, batch.index))
    return replace(batch, x=x, y=y, index=index)
