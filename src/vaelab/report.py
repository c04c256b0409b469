"""A run told on one page: ``report.html``, which holds all that it shows, and a model card in Markdown.

``gather`` reads and measures, ``html`` and ``card`` write; both say the same, from the same ``Facts``.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from vaelab import __version__, figures
from vaelab.config import Run, flat, override
from vaelab.diagnose import Finding, diagnose, examine
from vaelab.drawing import media, pictures
from vaelab.drawing.scene import Scene, closest, first_of_each_class, scene_of, sums, weighed
from vaelab.errors import UsageError
from vaelab.labels import Row, cost, duration, notes, pixels, rows_of, setting, title
from vaelab.measuring.kept import FORMAT
from vaelab.measuring.measure import Plan, measure
from vaelab.progress import Bar
from vaelab.recipes import RECIPES, flags_of, recipe
from vaelab.runs.checkpoint import read_json
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import data_of
from vaelab.slots import SLOTS, parts_of, sources_of

HEADLINES = {
    "negative_elbo": "−ELBO",
    "distortion": "distortion",
    "rate": "rate (KL)",
    "nll": "−log p(x) ≤",
    "active_units": "active units",
    "frechet": "Fréchet distance",
}
COLUMNS = 10  # images a row
SIDE = 64  # pixels of an image, at most


@final
@dataclass(frozen=True)
class Facts:
    """What a report tells.

    Args:
        name: of the run's folder.
        config: the content of ``config.json``.
        run: the configuration in it.
        history: one record an epoch.
        findings: the doctor's.
        metrics: the content of ``metrics.json``; None if the run has no model.
        scene: what pictures are made of; None if the run has no model.
        command: what trains the same.
        made: when the report was made.
    """

    name: str
    config: dict[str, Any]
    run: Run
    history: list[dict[str, Any]]
    findings: list[Finding]
    metrics: dict[str, Any] | None
    scene: Scene | None
    command: str
    made: datetime


def gather(path: Path, bar: Bar) -> Facts:
    """Read a run folder and examine the run; what has not been evaluated and takes seconds is measured now.

    Raises:
        UsageError: if there is no run.
        FailureError: if files are damaged or the data have changed.
    """
    folder = RunFolder.open(path)
    run, history = folder.run, folder.history()
    trained = (path / "best_model.pth").exists() and bool(history)
    scene = scene_of(path) if trained else None
    if scene is None:
        data = data_of(folder)
    else:
        data = scene.data
        if not _measured(path):
            measure(path, Plan(parts=("elbo", "latents", "reconstruction"), protocols=(run.data.protocol,)), bar)
    model = None if scene is None else scene.model
    findings = diagnose(examine(run, model, data, history, folder.failure()))
    metrics = read_json(path / "metrics.json") if trained else None
    name = path.resolve().name
    config = folder.config()
    if "refit" in config:  # a prior that was fitted after the training is no setting of it
        command = config["refit"]["command"]
    elif run.recipe in RECIPES:
        command = command_of(run, name)
    else:
        command = f"# config.json holds the settings: no recipe {run.recipe} is known here"
    return Facts(name, config, run, history, findings, metrics, scene, command, datetime.now(UTC))


def _measured(path: Path) -> bool:
    """Whether ``metrics.json`` has numbers of these weights."""
    content = read_json(path / "metrics.json") if (path / "metrics.json").exists() else {}
    of_these = content.get("format") == FORMAT and content.get("weights_sha256") == RunFolder(path).weights_sha256()
    return of_these and bool(content.get("splits"))


def command_of(run: Run, name: str) -> str:
    """The command that trains a run: its recipe, and what was chosen otherwise. A path is given by its last part."""
    flags = flags_of(override(run, data=Path(run.data.source).name))
    return shlex.join(["vaelab", *parts_of(run, whole=False), "train", run.recipe, *flags, "--out", name])


# --- pictures -------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Strip:
    """A row of images, and what is said of it."""

    label: str
    image: str


@final
@dataclass(frozen=True)
class Picture:
    """One figure of the page: an SVG, or rows of pixels."""

    title: str
    caption: str
    svg: str = ""
    strips: Sequence[Strip] = ()
    wide: bool = False


def _charts(facts: Facts) -> list[Picture]:
    """What can be drawn without a model."""
    if not facts.history:
        return []
    last = facts.history[-1]
    caption = (f"Epoch {last['epoch']}: {cost(last)} per validation image. Training is a mean over the epoch, noise, "
               "dropout and augmentation included.")  # fmt: skip
    before = " All this is under the prior that the run was trained with, not under the one it has now."
    before *= bool(last.get("before_refit"))
    svg = _svg(lambda: figures.training_history(facts.history), "training", 1)
    training = Picture("Training", caption + before, svg, wide=True)
    if "validation_rate" not in last:
        return [training]
    return [
        training,
        Picture("Rate and distortion", "The way through training, a point an epoch of the validation images. On a line "
                f"−ELBO is the same; down and left is better.{before}",
                _svg(lambda: figures.rate_distortion({"": facts.history}, title=" "), "rd")),
    ]  # fmt: skip


def _svg(draw: Callable[[], Figure], name: str, scale: float = 0.72) -> str:
    """A chart for the page: drawn smaller than on paper, so that its letters are larger."""
    with figures.theme("page"):
        figure = draw()
        width, height = figure.get_size_inches()
        figure.set_size_inches(scale * width, scale * height)
        return media.inline_svg(figure, name)


def _pictures(scene: Scene) -> tuple[list[Picture], list[str]]:
    """All that can be drawn of this model, and why the rest cannot."""
    made: list[Picture] = []
    left_out: list[str] = []
    for draw in (_reconstructions, _samples, _neighbours, _latent, _manifold, _kl, _traversals, _interpolation,
                 _arithmetic, _weights):  # fmt: skip
        try:
            made.append(draw(scene))
        except UsageError as error:
            left_out.append(str(error))
    return made, left_out


def _row(images: Tensor, columns: int = COLUMNS) -> str:
    return _png(figures.tile(_smaller(images, SIDE), columns, gap=1))


def _smaller(images: Tensor, side: int) -> Tensor:
    """Images at most so many pixels high and wide: a page of photographs would be too heavy to send."""
    largest = max(images.shape[2:])
    if largest <= side:
        return images
    size = [max(1, round(length * side / largest)) for length in images.shape[2:]]
    return interpolate(images.float().cpu(), size=size, mode="area")


def _png(canvas: Any) -> str:
    return "data:image/png;base64," + base64.b64encode(media.pixels_png(canvas)).decode()


def _grid(title: str, caption: str, strips: Sequence[tuple[str, Tensor]], columns: int = COLUMNS) -> Picture:
    return Picture(title, caption, strips=[Strip(name, _row(images, columns)) for name, images in strips])


def _reconstructions(scene: Scene) -> Picture:
    x = first_of_each_class(scene.data, 2 * COLUMNS)
    with torch.no_grad():
        x_hat = figures.decode(scene.model, scene.model.center(x))
    strips = [(name, images[start : start + COLUMNS]) for start in range(0, len(x), COLUMNS)
              for name, images in (("x", x), ("x̂", x_hat))]  # fmt: skip
    return _grid("Reconstructions", "Validation images, and below each the mean of p(x|z) at its code.", strips)


def _samples(scene: Scene) -> Picture:
    made = figures.decode(scene.model, figures.sample_prior(scene.model, 6 * COLUMNS, 0))
    return _grid("Samples", "Means of p(x|z) for z from the prior; not selected.",
                 [("", made[i : i + COLUMNS]) for i in range(0, len(made), COLUMNS)])  # fmt: skip


def _neighbours(scene: Scene) -> Picture:
    found = closest(scene)
    return _grid("Does it memorise?", f"Samples, and below each the two closest of {found.searched:,} training images. "
                 f"Median distance {found.of_samples:.2f}; of reconstructed validation images, as smooth as samples, "
                 f"{found.of_held_out:.2f}; of a copy 0.",
                 [("sample", found.samples), *zip(("closest", "second"), found.nearest.unbind(1), strict=False)],
                 len(found.samples))  # fmt: skip


def _latent(scene: Scene) -> Picture:
    found = figures.project(scene.means)
    own = "the two dimensions as they are" if scene.model.latent_dim == 2 else "their one dimension"
    how = own if found.how == "own" else "their first two principal components"
    caption = f"Codes of {len(scene.codes):,} validation images: {how}."
    svg = _svg(lambda: figures.latent_map(found, scene.codes.y, scene.data.classes, title=" "), "map")
    return Picture("Latent space", caption, svg)


def _manifold(scene: Scene) -> Picture:
    images, _ = figures.manifold_images(scene.model, 20)
    return Picture("Manifold", "The latent plane on a grid of equal prior probability, decoded.",
                   strips=[Strip("", _png(figures.tile(_smaller(images, SIDE // 2), 20, gap=0)))])  # fmt: skip


def _kl(scene: Scene) -> Picture:
    rate = scene.rate
    if rate is None:
        raise UsageError("no rate by dimension")
    caption = (f"Mean rate of each latent dimension over {len(scene.codes):,} validation images: {rate.sum():.2f} nats "
               f"in all; {scene.used} carry 0.1 or more.")  # fmt: skip
    return Picture("What each dimension carries", caption, _svg(lambda: figures.kl_bars(rate, title=" "), "kl"))


def _traversals(scene: Scene) -> Picture:
    order, steps = scene.order[: pictures.ROWS], 11
    codes = figures.traverse(scene.typical(1)[0], order, torch.linspace(-3, 3, steps))
    images = figures.decode(scene.model, codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
    names = [f"z{d + 1}" + ("" if scene.rate is None else f" · {scene.rate[d]:.2f}") for d in order]
    beside = "" if scene.rate is None else ", in nats beside its name"
    return _grid("Traversals", "One latent dimension a row, from −3 to 3, the others those of a typical image; "
                 f"{scene.ordered_by}{beside}.", list(zip(names, images, strict=True)), steps)  # fmt: skip


def _interpolation(scene: Scene) -> Picture:
    steps = 11
    between = figures.between(*scene.pairs(), torch.linspace(0, 1, steps), "spherical")
    images = figures.decode(scene.model, between.flatten(0, 1)).unflatten(0, between.shape[:2])
    return _grid("Interpolation", "From one typical image to another along a great circle.",
                 [("", row) for row in images], steps)  # fmt: skip


def _arithmetic(scene: Scene) -> Picture:
    names, terms = sums(scene)
    a, b, c = terms
    rows = [figures.decode(scene.model, codes) for codes in (a, b, c, a - b + c)]
    said = " ".join(f"{x}−{y}+{z}" for x, y, z in names)
    return _grid("Arithmetic", f"Sums of the mean codes of classes, column by column: {said}.",
                 list(zip(("a", "− b", "+ c", "="), rows, strict=True)), len(names))  # fmt: skip


def _weights(scene: Scene) -> Picture:
    bounds, ess, pixels = weighed(scene)
    svg = _svg(lambda: figures.importance_weights(bounds, ess), "weights", 1)
    caption = (f"Importance sampling of {len(ess)} validation images, {pixels}: the bound should have settled, and the "
               "weights should not hang on a few samples.")  # fmt: skip
    return Picture("Can the likelihood be trusted?", caption, svg, wide=True)


# --- the page -------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Table:
    """The metrics of one split under one protocol."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=list)


def _tables(facts: Facts) -> list[Table]:
    if facts.metrics is None:
        return []
    made: list[Table] = []
    data, beta = facts.metrics["data"], facts.metrics["beta"]
    for split, protocols in facts.metrics["splits"].items():
        for protocol, found in protocols.items():
            rows = list(rows_of(found["metrics"], beta).values())
            made.append(Table(title(data, split, protocol, found), rows, notes(found)))
    return made


def _headlines(facts: Facts) -> list[Row]:
    """The numbers to look at first: of the test images where they were scored, a likelihood where there is one."""
    if facts.metrics is None:
        return []
    splits = facts.metrics["splits"]
    protocols = splits.get("test") or next(iter(splits.values()))
    every = {k: estimate for found in reversed(list(protocols.values())) for k, estimate in found["metrics"].items()}
    own = protocols.get(facts.run.data.protocol, next(iter(protocols.values())))["metrics"]
    found = {**every, **own}
    shown = rows_of(found, facts.metrics["beta"])
    bounds = [key for key in found if key.startswith("nll_") and key[4:].isdecimal()]
    chosen: list[Row] = []
    for key, words in HEADLINES.items():
        name = max(bounds, key=lambda bound: int(bound[4:]), default="") if key == "nll" else key
        if name in found:
            row = shown[name]
            unit = "" if row.unit in ("units", "Fréchet distance") else row.unit
            value = f"{found[name]['value']:.0f}" if row.unit == "units" else row.value
            chosen.append(
                replace(row, name=words, value=value, unit=unit, protocol=row.protocol.split(", mean and s.d.")[0])
            )
    return chosen


def _summary(facts: Facts) -> str:
    """What was trained on what, in a sentence."""
    data, resolved = facts.config["data"], facts.config["resolved"]
    channels, height, width = data["shape"]
    kind = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    seconds = sum(record.get("seconds", 0.0) for record in facts.history)
    epochs = f"{len(facts.history)} epochs" if len(facts.history) != 1 else "1 epoch"
    best = "" if facts.scene is None else f"; the weights are those of epoch {facts.scene.epoch}"
    done = "" if data["protocol"] == "grey" else f" ({pixels(data['protocol'], channels)})"
    return (f"{facts.run.recipe} on {data['data']}: {data['train']:,} {kind} images of {height}×{width}{done}, "
            f"{resolved['parameters']:,} parameters, {epochs} in {duration(seconds)} on "
            f"{resolved['machine']}{best}.")  # fmt: skip


def _settings(facts: Facts) -> list[tuple[str, str, bool]]:
    """Every setting, its value, and whether it differs from the recipe's."""
    base = recipe(facts.run.recipe) if facts.run.recipe in RECIPES else facts.run
    rows: list[tuple[str, str, bool]] = []
    for slot in SLOTS:
        ours, theirs = (getattr(run, slot) for run in (facts.run, base))
        rows.append((slot, "auto" if ours is None else type(ours).__name__, type(ours) is not type(theirs)))
    before = {name: leaf.value for name, leaf in flat(base).items()}
    for name, leaf in flat(facts.run).items():
        shown = Path(leaf.value).name if name == "data" else leaf.value  # a path says more of a machine than of a run
        rows.append((name, setting(shown), name not in before or before[name] != leaf.value))
    return rows


def _environment(facts: Facts) -> list[tuple[str, str]]:
    resolved, data = facts.config["resolved"], facts.config["data"]
    commit = facts.config.get("commit")  # runs of vaelab 0.1 did not keep it
    rows = [("vaelab", facts.config["vaelab"] + (f", commit {commit}" if commit else ""))]
    rows += [(key, str(value)) for key, value in resolved.items() if value is not None]
    rows += [(key.replace("_", " "), value[:16]) for key, value in data.items() if key.endswith("sha256")]
    return [*rows, ("report made by", f"vaelab {__version__}, {facts.made:%Y-%m-%d %H:%M} UTC")]


def _filled(template: str, facts: Facts, **extra: Any) -> str:
    entry = RECIPES.get(facts.run.recipe)
    environment = Environment(loader=PackageLoader("vaelab"), autoescape=template.endswith(".html"),
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return environment.get_template(template).render(
        facts=facts, summary=_summary(facts), tables=_tables(facts), headlines=_headlines(facts),
        settings=_settings(facts), environment=_environment(facts),
        source="" if entry is None else entry.source, **extra,
    )  # fmt: skip


def html(facts: Facts) -> str:
    """The page, with all that it shows in it."""
    made, left_out = ([], []) if facts.scene is None else _pictures(facts.scene)
    return _filled("report.html", facts, charts=_charts(facts), pictures=made, left_out=left_out)


def card(facts: Facts) -> str:
    """The model card."""
    return _filled(
        "card.md", facts, modules=[Path(source).name.removesuffix(".py") for source in sources_of(facts.run)]
    )
