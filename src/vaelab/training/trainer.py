"""The state of a training run and what changes it: a step, the end of an epoch, a checkpoint that is loaded."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from vaelab import specs
from vaelab.config import Run, require_effect
from vaelab.data.augment import augment
from vaelab.data.datasets import BATCH, Dataset, binarize_batch, unit
from vaelab.data.guard import require_fit
from vaelab.errors import NotFiniteError, UsageError
from vaelab.models import VAE, Batch
from vaelab.networks import Decoder, batch_norms, has_dropout, initialise
from vaelab.objectives import sum_parts
from vaelab.posteriors import VectorQuantized
from vaelab.priors import VampPrior
from vaelab.processes.distributed import Team
from vaelab.runtime import (
    Noise,
    RowNoise,
    StepNoise,
    derived_seed,
    epoch_order,
    eval_mode,
    generator,
    has_fast_bf16,
    keep_freed_memory,
    machine,
    reseed,
    resolve_precision,
    seeded,
)
from vaelab.specs import Shape, Spec
from vaelab.training.compiling import choose
from vaelab.training.stepping import COMMON, CompiledStep, PlainStep, Step, term_names
from vaelab.training.trial import require_contract
from vaelab.training.updates import AdamUpdate, CannotCompileError, MovingAverage

log = logging.getLogger("vaelab")


def likelihood_of(run: Run, shape: Shape) -> Spec:
    """The likelihood of a run's images: its own, else the Bernoulli for grey images and the Gaussian for colour."""
    return run.likelihood or (specs.Bernoulli() if shape[0] == 1 else specs.Gaussian())


def build_model(run: Run, shape: Shape) -> VAE:
    """Make a run's model for images of this shape, with weights that depend on the run's seed alone."""
    likelihood = likelihood_of(run, shape)
    with seeded(derived_seed(run.training.seed, "weights")):
        model = VAE(run.encoder, run.posterior, run.prior, run.decoder, likelihood, shape)
        if run.training.init != "torch":
            initialise(model, run.training.init)
        return model


@final
class Trainer:
    """The state of a run, and the three things that change it: a step, the end of an epoch, loading a checkpoint."""

    def __init__(self, run: Run, data: Dataset, device: torch.device, team: Team | None = None) -> None:
        require_effect(run)
        self.run, self.data, self.device, self.team = run, data, device, team or Team()
        keep_freed_memory()
        gap = run.bf16_gap if run.likelihood or data.shape[0] == 1 else None  # measured with grey images' likelihood
        self.precision = resolve_precision(run.training.precision, device, gap)
        self.batch_size = min(run.training.batch_size, len(data.train))
        slower = self.precision == "bf16" and device.type == "cpu" and not has_fast_bf16(device)
        hint = ", where fp32 is faster (--precision auto)" if slower else ""
        log.info("computing in %s on %s%s", self.precision, machine(device), hint)
        if self.batch_size < run.training.batch_size:
            log.info("batch size %d: there are no more training images", self.batch_size)
        if self.batch_size % self.team.world:
            raise UsageError(
                f"a batch of {self.batch_size} cannot be shared by {self.team.world} processes: choose a --batch-size "
                "that their number divides"
            )
        if run.objective.remembers:
            self._require_own_rows()
        self.rows_per_step = self.batch_size // self.team.world
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.model = build_model(run, data.shape).to(device)
        if self.rows_per_step == 1 and _normalises_one_number(self.model):
            raise UsageError("batch normalisation needs more than one image a step where a map is one pixel: give more "
                             "images or a larger --batch-size, or leave it out")  # fmt: skip
        require_fit(self.model.likelihood_head, data, ("train", "validation"))
        if run.training.init == "glorot":
            mean = data.train.mean().clamp(0.001, 0.999)
            cast(Decoder, self.model.decoder).start_at(self.model.likelihood_head.start(mean))
        if isinstance(self.model.prior_part, VampPrior):
            self.model.prior_part.start_at(self._some_images(self.model.prior_part.spec.num_components))
        if isinstance(self.model.posterior_head, VectorQuantized):
            self._start_codebook(self.model.posterior_head)
        self.networks = self._build_networks()
        require_contract(run, self.model, self.networks)
        self._no_parts = self._require_fit()
        self.names = term_names(run.objective)
        self.groups = run.objective.groups(self.model, self.networks)
        self.schedule = run.schedule.schedule(self.steps_per_epoch, run.training.epochs)
        self.optimizers = {name: run.optimizer.build(group, self.schedule(0)) for name, group in self.groups.items()}
        plateau = run.schedule if isinstance(run.schedule, specs.Plateau) else None
        self.plateaus = [_plateau(plateau, optimizer) for optimizer in self.optimizers.values() if plateau]
        decay = run.training.ema_decay
        self.average = MovingAverage(self.model, decay) if decay else None
        self.has_dropout = has_dropout(self.model)
        wanted = choose(run.training.compile, self.model, self.rows_per_step, self.total_steps, device)
        if wanted and run.objective.remembers:  # what it keeps grows while images come for the first time
            log.info("steps of --objective %s are not compiled", run.objective.word)
            wanted = False
        self.compiled = self.team.agree(wanted)
        self.step = 0
        self.stopped = False
        self.best: tuple[float, int] | None = None  # the lowest monitored loss, and its epoch
        self.best_weights: dict[str, Tensor] | None = None
        # Terms of the epoch's steps so far stay on the device: no step waits for a number to reach the host.
        self.terms = torch.zeros(self.steps_per_epoch, len(self.names), device=device)
        self.zero = torch.zeros((), device=device)
        trained = sum(parameter.numel() for group in self.groups.values() for parameter in group)
        self.team.share_memory(trained, COMMON if self.compiled else 0, device)
        if self.team.world > 1:
            way = "share memory" if self.team.memory else "send each other messages"
            log.info("%d processes, which %s", self.team.world, way)
        self.order = torch.empty(0)
        self._take_step: Step | None = None

    def _require_own_rows(self) -> None:
        """Refuse what an objective that keeps something of each image cannot do with."""
        word, index = self.run.objective.word, self.data.train.index
        if self.team.world > 1:
            raise UsageError(f"--objective {word} keeps something of each image, which processes do not share: train "
                             "it in one")  # fmt: skip
        if len(index.unique()) < len(index):
            raise UsageError(f"--objective {word} keeps something of each image, by its row number, and several images "
                             "have the same: give each its own index")  # fmt: skip

    def _some_images(self, count: int) -> Tensor:
        """Training images (at most ``count``, C, H, W), always the same."""
        order = torch.randperm(len(self.data.train), generator=generator(self.run.training.seed, "pseudo-inputs"))
        return self.data.train.rows(order[:count].to(self.device)).x

    def _start_codebook(self, head: VectorQuantized) -> None:
        """Let the codes start at what the encoder makes of training images, at most one of each."""
        with torch.no_grad():
            head.start_at(self.model.eval().encoder(self._some_images(head.spec.num_codes)))

    def _build_networks(self) -> nn.ModuleDict:
        with seeded(derived_seed(self.run.training.seed, "networks")):
            return self.run.objective.networks(self.model).to(self.device)

    def _require_fit(self) -> dict[str, Tensor]:
        """Refuse an objective that asks of the model what it has not; returns zeros in the shapes of its parts."""
        if isinstance(self.run.prior, specs.TwoStage):
            raise UsageError("--prior two-stage is fitted to the codes of a trained run, not trained with it: "
                             "vaelab refit RUN --prior two-stage")  # fmt: skip
        images = torch.zeros(2, *self.model.shape, device=self.device)
        objective = self.run.objective.at(math.inf)
        try:
            with torch.no_grad():
                parts = objective.parts(self.model.eval(), self.networks.eval(), Batch(images),
                                        RowNoise(0, device=self.device))  # fmt: skip
        except TypeError as error:
            blames = "" if str(error).startswith("--") else f"--objective {objective.word} cannot train this model: "
            hint = "; rae, mmd and aae need no density" if isinstance(self.run.posterior, specs.Deterministic) else ""
            raise UsageError(f"{blames}{error}{hint}") from error
        home = "cpu" if self.device.type == "mps" else self.device  # Apple's GPUs have no float64
        return {name: torch.zeros(part.shape[1:], dtype=torch.float64, device=home) for name, part in parts.items()}

    @property
    def epoch(self) -> int:
        """Whole epochs that lie behind."""
        return self.step // self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless it stops early."""
        return self.run.training.epochs * self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.stopped or self.step >= self.total_steps

    @property
    def evaluated(self) -> VAE:
        """The model whose weights count: the averaged ones, if the run averages."""
        return self.model if self.average is None else cast(VAE, self.average.module)

    def train_step(self) -> None:
        """Take one step."""
        within = self.step % self.steps_per_epoch
        if within == 0 or len(self.order) == 0:
            self.order = epoch_order(len(self.data.train), self.run.training.seed, self.epoch, self.device)
            self.model.train()
            self.networks.train()
        noise = StepNoise(self.run.training.seed, self.step, self.device, self.team.rank, self.team.world)
        first = within * self.batch_size + self.team.rank * self.rows_per_step
        batch = self.data.train.raw(self.order[first : first + self.rows_per_step])
        if self.run.augment.augment_prob > 0:
            batch = augment(replace(batch, x=unit(batch.x)), self.run.augment, noise)
        if self.has_dropout or self.run.objective.samples:
            reseed(self.run.training.seed, self.step, self.device, self.team.rank)
        objective = self.run.objective.at(self.step / self.steps_per_epoch)
        if not self.plateaus:
            for optimizer in self.optimizers.values():
                for settings in optimizer.param_groups:
                    settings["lr"] = self.schedule(self.step)
        if self._take_step is None:
            self._take_step = self._choose_step()
        terms = self._take_step(objective, batch, noise)
        if isinstance(self.model.posterior_head, VectorQuantized):
            self.model.posterior_head.move(self.team)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.terms[within] = terms
        self.step += 1

    def _choose_step(self) -> Step:
        plain = PlainStep(self.model, self.networks, self.groups, self._pixels, self._autocast, self._descend)
        if not self.compiled:
            return plain
        update: AdamUpdate | None = None
        with contextlib.suppress(CannotCompileError):
            update = AdamUpdate(self.optimizers, self.run.training.clip_norm)
        return CompiledStep(plain, update, self.team)

    def _pixels(self, batch: Batch, noise: Noise) -> Batch:
        """What a step sees of a batch."""
        batch = replace(batch, x=unit(batch.x))
        return binarize_batch(batch, noise) if self.data.protocol == "dynamic" else batch

    def _descend(self, names: Sequence[str]) -> Tensor:
        """One optimizer step of these groups, whose gradients are set; the largest of their norms, if clipped."""
        clip = self.run.training.clip_norm
        norms = [self.zero]
        self.team.average_gradients(itertools.chain.from_iterable(self.groups[name] for name in names))
        for name in names:
            if clip is not None:
                norms.append(clip_grad_norm_(self.groups[name], clip))
            self.optimizers[name].step()
        return functools.reduce(torch.maximum, norms)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    def recent_terms(self) -> dict[str, float]:
        """Mean terms of the last steps of this epoch, at most 50, and the learning rate.

        Raises:
            NotFiniteError: if a loss of this epoch is not finite, naming the step and the term.
        """
        self.check_finite()
        done = self._steps_into_epoch()
        mean = self.terms[max(0, done - 50) : done].mean(0).tolist()
        return {**dict(zip(self.names, mean, strict=True)), "learning_rate": self.learning_rate()}

    def check_finite(self) -> None:
        """Raise if a step of this epoch had a loss that is NaN or infinite."""
        done = self._steps_into_epoch()
        terms = self.terms[:done]
        bad = (~torch.isfinite(terms)).nonzero()
        if len(bad) == 0:
            return
        row, _ = bad[0].tolist()
        values: dict[str, float] = dict(zip(self.names, terms[row].tolist(), strict=False))
        suspects = (*self.names[1:-1], "loss", "grad_norm")
        term = next(name for name in suspects if not math.isfinite(values[name]))
        step = self.step - done + row
        raise NotFiniteError(
            f"the loss is no longer finite: {term} is {values[term]} at step {step} "
            f"(epoch {step // self.steps_per_epoch + 1}); try a smaller learning rate, or --clip-norm 1",
            step, term,
        )  # fmt: skip

    def agree_on_terms(self) -> None:
        """Let the terms of this epoch's steps, of which each process has those of its rows, be means over all."""
        self.team.average_(self.terms)

    def _steps_into_epoch(self) -> int:
        """Steps whose terms are at hand: of the running epoch, or all of the one that has just ended."""
        return (self.step - 1) % self.steps_per_epoch + 1 if self.step else 0

    def end_epoch(self) -> dict[str, Any]:
        """Validate, remember the best weights, let plateau and early stopping decide; return the epoch's record."""
        self.agree_on_terms()
        self.check_finite()
        # Running means of batch norm are each process's own.
        self.team.follow(self.model.buffers())
        self.team.follow(self.networks.buffers())
        if self.average is not None:
            self.team.follow(self.average.buffers())
        objective = self.run.objective.at(self.step / self.steps_per_epoch)
        training = dict(zip(self.names, self.terms.cpu().double().mean(0).tolist(), strict=True))
        learning_rate = self.learning_rate()
        validation = self.validate()
        self._monitor(validation["validation_loss"])
        if self.run.training.clip_norm is None:
            del training["grad_norm"]
        return {
            "epoch": self.epoch,
            "step": self.step,
            **training,
            **validation,
            "beta": objective.beta,
            "learning_rate": learning_rate,
        }

    def validate(self) -> dict[str, float]:
        """Validation means in nats per image, the loss at the objective's final weights, with fixed noise."""
        objective, model = self.run.objective.at(math.inf), self.evaluated.eval()
        size = self.batch_size if objective.in_batch else BATCH
        batches = self.team.share(self.data.batches("validation", size))
        with self._autocast():
            sums = sum_parts(objective, model, self.networks.eval(), batches, self._no_parts)
        sums = {name: part.clone() for name, part in sums.items()}  # a process without images has no sums of its own
        self.team.average_(*sums.values())
        means = {name: part.cpu() * self.team.world / len(self.data.validation) for name, part in sums.items()}
        loss = float(objective.loss(means))
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the validation loss is {loss} after step {self.step}: try a smaller learning rate",
                self.step, "validation_loss",
            )  # fmt: skip
        return {"validation_loss": loss, **{f"validation_{name}": float(means[name]) for name in objective.terms}}

    def _monitor(self, loss: float) -> None:
        settled = max(self.run.objective.annealing_epochs, self.run.schedule.warmup_epochs)
        if self.epoch < settled:
            return
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.epoch)
            self.best_weights = {name: value.clone() for name, value in self.evaluated.state_dict().items()}
        for plateau in self.plateaus:
            plateau.step(loss)
        patience = self.run.training.patience
        self.stopped = patience is not None and self.epoch - self.best[1] >= patience

    def best_model(self) -> VAE:
        """The model with the best weights, in ``eval`` mode; the current ones if none were monitored yet."""
        if self.team.memory is not None:
            self.team.memory.release()  # another process may still look at the weights of the last step
        model = self.evaluated
        if self.best_weights is not None:
            model.load_state_dict(self.best_weights)
        return model.eval()

    def state(self) -> dict[str, Any]:
        """All that a resume needs besides the configuration.

        Raises:
            NotFiniteError: if a weight is not finite: the checkpoint that it would replace is better.
        """
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NotFiniteError(
                    f"the weights are no longer finite: {name} at step {self.step}; try --clip-norm 1", self.step, name
                )
        return {
            "step": self.step,
            "stopped": self.stopped,
            "best": None if self.best is None else list(self.best),
            "model": self.model.state_dict(),
            "networks": self.networks.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "plateaus": [plateau.state_dict() for plateau in self.plateaus],
            "terms": self.terms,
        }

    def load_state(self, state: dict[str, Any], best_weights: dict[str, Tensor] | None) -> None:
        """Take up the state of a checkpoint."""
        self._take_step = None  # a compiled step holds on to the optimizers' state, which is now replaced
        self.step, self.best_weights = state["step"], best_weights
        self.best = None if state["best"] is None else tuple(state["best"])
        # A run that had come to its end by early stopping stays ended; more epochs do not revive it.
        self.stopped = state["stopped"]
        self.model.load_state_dict(state["model"])
        self.networks.load_state_dict(state["networks"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            fused = [group.get("fused") for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizers"][name])
            for group, own in zip(optimizer.param_groups, fused, strict=True):
                if "fused" in group:  # the checkpoint may be of another device
                    group["fused"] = own
        # Not strict: where there are none, earlier checkpoints hold None for each optimizer.
        for plateau, saved in zip(self.plateaus, state["plateaus"], strict=False):
            plateau.load_state_dict(saved)
        self.terms.copy_(state["terms"])

    def resolved(self) -> dict[str, Any]:
        """What ``auto`` was resolved to, and the machine, for ``config.json``."""
        return {
            "precision": self.precision,
            "compile": self.compiled,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "parameters": self.model.num_parameters(),
            "machine": machine(self.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def _normalises_one_number(model: VAE) -> bool:
    """Whether a batch norm gets maps of one pixel: of one image that is a number a channel, which has no variance."""
    pixels: list[int] = []
    hooks = [
        norm.register_forward_hook(lambda _, inputs, __: pixels.append(inputs[0][0, 0].numel()))
        for norm in batch_norms(model)
    ]
    with eval_mode(model), torch.no_grad():
        model.draw(torch.zeros(1, *model.shape, device=model.device), noise=RowNoise(0, device=model.device))
    for hook in hooks:
        hook.remove()
    return 1 in pixels


def _plateau(schedule: specs.Plateau, optimizer: Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(
        optimizer, factor=schedule.lr_factor, patience=schedule.lr_patience, min_lr=schedule.min_lr, threshold=0.0
    )
