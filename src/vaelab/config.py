"""A run as data: frozen dataclasses that print as a table, change by flat names, and round-trip through JSON.

Every leaf of a ``Run`` has one flat name, the same in Python (``override(run, beta=0.5)``) and on the command line
(``--beta 0.5``): the field's own name where only one slot has it, else the slot's name in front
(``encoder_hidden_dims``). Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, final

from vaelab import objectives, specs
from vaelab.errors import UsageError, did_you_mean
from vaelab.slots import (
    MEASURED,
    SLOTS,
    Decoder,
    Encoder,
    LearningRate,
    Likelihood,
    Objective,
    Optimizer,
    Posterior,
    Prior,
    kinds,
    kinds_by_word,
    name_of,
    named,
    unregistered,
)
from vaelab.specs import option, positive


@final
@dataclass(frozen=True)
class Data:
    """What is trained on, and under which protocol."""

    source: str = option(
        "mnist", "mnist, digits, freyfaces, sprites, or a path to images, .npy, .npz or idx files", flag="data"
    )
    protocol: Literal["grey", "dynamic", "static", "threshold"] = option(
        "grey", "pixels as they are, or binarized: a new draw each time, one fixed draw, or x > 0.5"
    )
    validation_size: float | None = positive(None, "images held out for validation: a number, or a fraction below 1")
    test_size: float | None = positive(None, "the same for the test set, where the data have none of their own")
    image_size: tuple[int, int] | None = positive(None, "height and width that a folder's images are brought to")
    channels: Literal[1, 3] | None = option(None, "1: grey, 3: colour; default: as the images are")
    value_range: Literal["auto", "unit", "byte", "symmetric"] = option(
        "auto", "what an array's values mean: 0..1, 0..255 or -1..1", flag="range", aliases=("value_range",)
    )

    def __post_init__(self) -> None:
        if not self.source:  # as a path it would be the current folder
            raise UsageError("--data is empty: name a data set or a path")


@final
@dataclass(frozen=True)
class Augment:
    """Random rotation and translation of training images."""

    rotate: float = option(0.0, "largest rotation, in degrees")
    shift: float = option(0.0, "largest shift along each axis, in pixels")
    augment_prob: float = option(0.0, "share of the images that are augmented", at_most=1)


@final
@dataclass(frozen=True)
class Training:
    """The loop: how long, how, and on what."""

    epochs: int = positive(20, "passes over the training images")
    batch_size: int = positive(128, "images a step")
    clip_norm: float | None = positive(None, "largest norm of the gradient; longer ones are scaled down")
    patience: int | None = positive(None, "stop after so many epochs without a better validation loss")
    init: Literal["torch", "glorot", "normal"] = option(
        "torch", "weights at the start: torch's, Glorot's with the pixels' mean as the decoder's bias, or N(0, 0.01²)"
    )
    ema_decay: float = option(0.0, "average the weights with this decay a step (0: off), and use the average", below=1)
    seed: int = option(0, "seed of the weights, the order, the noise and the augmentation")
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "arithmetic of matrix products and convolutions")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile the training step (10 to 60 s); auto: where a long run gains from it"
    )
    device: str = option("auto", "cpu, cuda, mps; auto takes a GPU if there is one")
    threads: int | None = positive(None, "CPU threads; default: torch's")
    save_every: int | None = positive(None, "save a checkpoint each so many steps, besides each epoch")


@final
@dataclass(frozen=True)
class Picture:
    """A file that a run draws into its folder.

    Args:
        draw: the kind of picture (the names in ``vaelab.drawing.pictures``).
        file: its name; ``{epoch}`` stands for the epoch.
        every: draw it each so many epochs, and after the last; None: after the last only.
    """

    draw: str
    file: str
    every: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines a training run. Immutable; ``override`` makes changed copies.

    Args:
        recipe: the recipe's name.
        likelihood: None takes the Bernoulli for grey images and the Gaussian with one learned sigma for colour.
        bf16_gap: |bf16 - fp32| of the test objective in nats, as committed results show; None if never measured.
    """

    recipe: str
    data: Data = Data()
    encoder: Encoder = specs.MLPEncoder()
    posterior: Posterior = specs.DiagonalNormal()
    prior: Prior = specs.StandardNormal()
    decoder: Decoder = specs.MLPDecoder()
    likelihood: Likelihood | None = None
    objective: Objective = objectives.ELBO()
    optimizer: Optimizer = specs.Adam()
    schedule: LearningRate = specs.Constant()
    augment: Augment = Augment()
    training: Training = Training()
    pictures: tuple[Picture, ...] = ()
    bf16_gap: float | None = None

    def pictures_due(self, epoch: int, *, last: bool) -> list[Picture]:
        """The pictures that are drawn after this epoch; those of the end alone are not."""
        return [p for p in self.pictures if p.every is not None and (last or epoch % p.every == 0)]

    def __str__(self) -> str:
        """The run as the table that it is."""
        leaves = flat(self)
        width = max(map(len, leaves))
        parts = {slot: getattr(self, slot) for slot in SLOTS}
        slots = (f"{slot:{width}}  {'auto' if part is None else type(part).__name__}" for slot, part in parts.items())
        values = (f"{name:{width}}  {leaf.value}" for name, leaf in leaves.items())
        return "\n".join([f"{'recipe':{width}}  {self.recipe}", *slots, *values])


# --- flat names -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """One setting of a run: where it is, what it is, and what its ``option`` says of it."""

    slot: str
    field: str
    value: Any
    type: Any
    help: str
    aliases: tuple[str, ...]
    flag: str | None
    above_zero: bool
    at_most: float
    below: float


def flat(run: Run) -> dict[str, Leaf]:
    """All settings of a run by their flat names.

    Raises:
        UsageError: if two of them have one name, as parts of one's own may.

    Example:
        >>> leaves = flat(Run(recipe="example"))
        >>> leaves["beta"].value, leaves["latent_dim"].aliases, "encoder_hidden_dims" in leaves
        (1.0, ('z_dim',), True)
    """
    found: list[tuple[str, Leaf]] = []
    for slot in (f.name for f in dataclasses.fields(run)):
        part = getattr(run, slot)
        if not dataclasses.is_dataclass(part):
            continue
        hints = typing.get_type_hints(type(part))
        for item in dataclasses.fields(part):
            leaf = Leaf(slot, item.name, getattr(part, item.name), hints[item.name], **item.metadata)
            found.append((leaf.flag or item.name, leaf))
    names = [name for name, _ in found]
    named_ = [(name if names.count(name) == 1 else f"{leaf.slot}_{name}", leaf) for name, leaf in found]
    owners: dict[str, Leaf] = {}
    for name, leaf in named_:
        for word in (name, *leaf.aliases):
            if (other := owners.get(word)) is not None:
                kinds_ = [type(getattr(run, one.slot)).__name__ for one in (other, leaf)]
                raise UsageError(
                    f"the name {word!r} is taken on the command line: it is {kinds_[0]}.{other.field}'s and "
                    f"{kinds_[1]}.{leaf.field}'s; rename one"
                )
            owners[word] = leaf
    return dict(named_)


def override(run: Run, **changes: Any) -> Run:
    """Return a copy of the run with settings changed by their flat names, or whole slots by theirs.

    A slot takes a spec (``encoder=specs.MLPEncoder((64,))``) or, in words, the name of one
    (``optimizer="adamw"``), with that spec's defaults. Slots are changed before settings.

    Raises:
        UsageError: on a name that the run does not have, or a value of the wrong type.

    Example:
        >>> override(Run(recipe="example"), beta=0.5, z_dim=2).posterior
        DiagonalNormal(latent_dim=2)
    """
    for slot in [name for name in changes if name in SLOTS]:
        part = _spec(slot, changes.pop(slot))
        if slot in MEASURED and type(part) is not type(getattr(run, slot)):
            run = dataclasses.replace(run, bf16_gap=None)  # that of another model
        run = dataclasses.replace(run, **{slot: part})
    leaves = flat(run)
    names = leaves | {alias: leaf for leaf in leaves.values() for alias in leaf.aliases}
    fields: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in names:
            raise UsageError(f"{run.recipe} has no setting {name!r}{did_you_mean(name, [*names, *SLOTS])}")
        leaf = names[name]
        if leaf.field in fields.setdefault(leaf.slot, {}):
            raise UsageError(f"{name!r} is another name of a setting that is given too: leave one out")
        fields[leaf.slot][leaf.field] = _coerced(name, value, leaf.type)
    for slot, values in fields.items():  # a slot at once: its settings may have to fit each other
        run = dataclasses.replace(run, **{slot: dataclasses.replace(getattr(run, slot), **values)})
    if run.augment.augment_prob == 0 and any(fields.get("augment", {}).values()):
        raise UsageError("--rotate and --shift move no image while --augment-prob is 0: give that too")
    _check(run)
    return run


def data_from(**settings: Any) -> Data:
    """Data of these settings, each brought to its field's type.

    Raises:
        UsageError: if one is of another type.
    """
    hints = typing.get_type_hints(Data)
    return Data(**{name: _coerced(name, value, hints[name]) for name, value in settings.items()})


def _check(run: Run) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """
    for name, leaf in flat(run).items():
        for number in leaf.value if isinstance(leaf.value, tuple) else (leaf.value,):
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            flag = f"--{name.replace('_', '-')} {number}"
            if not math.isfinite(number):
                raise UsageError(f"{flag}: must be a finite number")
            if number < 0 or (leaf.above_zero and number == 0):
                raise UsageError(f"{flag}: must be {'greater than' if leaf.above_zero else 'at least'} 0")
            if number > leaf.at_most or number >= leaf.below:
                raise UsageError(f"{flag}: must be between 0 and {min(leaf.at_most, leaf.below):g}")


def require_effect(run: Run) -> None:
    """Refuse settings of a run to be trained that would change nothing.

    Raises:
        UsageError: naming the setting, and why.
    """
    rule = run.objective
    if isinstance(rule, objectives.ThroughFew) and (rule.backward_samples or 0) >= rule.num_samples:
        raise UsageError(
            f"--backward-samples {rule.backward_samples}: must be fewer than --num-samples {rule.num_samples}"
        )
    weighs = isinstance(rule, objectives.ELBO) and (rule.beta != 1 or rule.kl_warmup_epochs > 0)
    if isinstance(run.posterior, specs.VectorQuantized) and (weighs or isinstance(rule, objectives.Capacity)):
        raise UsageError(
            "the rate of a codebook is the same for every image, and no weight on it (--beta, --kl-warmup-epochs, "
            "--objective capacity) changes anything: leave it out of --posterior vq"
        )


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A run, or a part of one, as plain JSON; ``from_json`` restores a run exactly."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": name_of(type(value)), **fields}
    return [to_json(item) for item in value] if isinstance(value, tuple) else value


def from_json(content: Mapping[str, Any]) -> Run:
    """Restore a run, strictly: a key or a kind of part that is not known is an error, never dropped.

    Raises:
        UsageError: naming what is not known, and the closest name that is.
    """
    content = dict(content)
    content.pop("kind", None)
    run = _decode(Run, content, "the run")
    _check(run)
    return run


def _decode(kind: type, content: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(content.keys() - known):
        raise UsageError(f"{where} has an unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    hints = typing.get_type_hints(kind)
    if kind is Run:
        hints |= {slot: Union[(hints[slot], *kinds(slot))] for slot in SLOTS}
    try:
        return kind(**{key: _decode_value(value, hints[key], f"{where}.{key}") for key, value in content.items()})
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from error


def _decode_value(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        name = str(value.get("kind"))
        allowed: dict[str, type] = {name_of(kind): kind for kind in _members(hint) if isinstance(kind, type)}
        if (kind := named(name, allowed.values())) is None:
            if ":" in name:
                raise UsageError(f"{where} is {unregistered(name)}")
            raise UsageError(f"{where} is of an unknown kind {name!r}{did_you_mean(name, allowed)}")
        return _decode(kind, {k: v for k, v in value.items() if k != "kind"}, where)
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return tuple(_decode_value(item, typing.get_args(hint)[0], where) for item in value)
    return _coerced(where, value, hint)


# --- types ----------------------------------------------------------------------------------------------------------


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _spec(slot: str, value: Any) -> Any:
    if isinstance(value, kinds(slot)) or (slot == "likelihood" and value is None):
        return value
    names = kinds_by_word(slot)
    if dataclasses.is_dataclass(value):
        remedy = "it was registered anew since: make this one of the new class"
        if name_of(type(value)) not in map(name_of, kinds(slot)):
            remedy = f"@vaelab.register({slot!r}) its class first"
        raise UsageError(f"{slot} may not be this {type(value).__name__}: {remedy}")
    if not isinstance(value, str) or value.lower() not in names:
        raise UsageError(f"{slot} {value!r} is not known{did_you_mean(str(value), names)}")
    return names[value.lower()]()


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """Bring a value to its field's type where that loses nothing (5 to 5.0, [2, 3] to (2, 3)), else refuse it."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and value.ndim == 0:  # without importing NumPy
        value = value.item()
    for member in _members(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is Literal and value in arguments and type(value) is type(arguments[arguments.index(value)]):
            return value
        if member is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if member is type(None) and value is None:
            return None
        if origin is tuple and isinstance(value, list | tuple):
            items = typing.cast("list[Any]", value)
            kinds_ = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
            if len(kinds_) == len(items):
                return tuple(_coerced(name, item, kind) for item, kind in zip(items, kinds_, strict=True))
        if isinstance(member, type) and type(value) is member:
            return value
    shown = str(hint).replace("typing.", "") if not isinstance(hint, type) else hint.__name__
    raise UsageError(f"{name} = {value!r}: expected {shown}")
