"""Runs side by side: which of their numbers may stand in one row, and which differ by more than their noise.

A table holds numbers of the same images (data set, split, what was done to the pixels, and the images' hash); a row of
it, numbers of one metric whose protocols are the same to the letter. All others are kept apart, and it is said why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from vaelab import __version__
from vaelab.config import Run, flat
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import Estimate
from vaelab.labels import pixels
from vaelab.measuring.kept import FORMAT
from vaelab.models import VAE
from vaelab.runs.checkpoint import read_json
from vaelab.runs.folder import MACHINE_SETTINGS, RunFolder
from vaelab.runs.loading import load_model
from vaelab.slots import SLOTS

CAVEAT = "not a likelihood"  # what the protocol of a cross-entropy on other than binary pixels says of itself

_LOWER = ("negative_elbo", "distortion", "objective", "bits_per_dim", "nll_ais", "frechet", "mse")
_HIGHER = ("psnr", "ssim", "precision", "recall", "linear_probe", "knn_probe")
_OF_PIXELS = ("negative_elbo", "distortion", "objective", "bits_per_dim", "nll_ais")  # and nll_k: they hold log p(x|z)
_PROBES = ("linear_probe", "knn_probe")
# What a protocol tells of the run that it was used on: its size or a result, not a condition of comparing.
_OF_THE_RUN = re.compile(
    r"[,;:] (of \d+(?=, Var_x)|saturated|[\d,]+ images at or above \S+ dB counted as \S+ dB)(?=[,;]|$)"
)

MARK = 2.0  # combined standard errors


@final
@dataclass(frozen=True)
class Place:
    """What was measured of one split under one protocol.

    Args:
        scores: the estimates by their metric's name.
        images: the hash of the images as they were scored.
        fitted: the hash of the training images that probes were fitted on.
        floor: what a cross-entropy on pixels that are not binary cannot go below, in nats; None of a likelihood.
    """

    scores: dict[str, Estimate]
    images: str
    fitted: str
    floor: float | None


@final
@dataclass(frozen=True)
class Measured:
    """A run that was evaluated.

    Args:
        name: the end of its path, as much of it as tells it from the others.
        path, run: its folder, and its configuration.
        record, resolved: what its data were when it was trained; what ``auto`` was resolved to, and the machine.
        history, model: one record an epoch; its best model.
        places: what was measured, by (split, protocol).
    """

    name: str
    path: Path
    run: Run
    record: dict[str, Any]
    resolved: dict[str, Any]
    history: list[dict[str, Any]]
    model: VAE
    places: dict[tuple[str, str], Place]

    @property
    def is_real(self) -> bool:
        """Whether p(x|z) is a density over real-valued pixels: its nats are not those of a probability."""
        return self.model.likelihood_head.support in ("real", "unit")

    def about(self) -> dict[str, Any]:
        """What a reader must know of a run before its numbers; seconds are of training, validation included."""
        training = self.run.training
        return {
            "name": self.name, "path": str(self.path), "recipe": self.run.recipe, "seed": training.seed,
            "epochs": self.history[-1]["epoch"], "epochs_asked_for": training.epochs,
            "parameters": self.model.num_parameters(), "machine": self.resolved.get("machine"),
            "seconds": round(sum(record["seconds"] for record in self.history), 1),
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """All settings by their flat names, with what ``auto`` was resolved to, and the kinds of the parts."""
        kinds = {slot: getattr(getattr(self.run, slot), "word", "auto") for slot in SLOTS}
        values = {name: leaf.value for name, leaf in flat(self.run).items()}
        return {**kinds, **values, **{k: self.resolved[k] for k in sorted(MACHINE_SETTINGS) if k in self.resolved}}


@final
@dataclass(frozen=True)
class Cell:
    """A number, its standard error (None where there is none), and what its protocol says of its run alone."""

    value: float
    stderr: float | None
    remark: str


@final
@dataclass(frozen=True)
class Row:
    """Numbers that may be compared.

    Args:
        metric: its name in ``metrics.json``.
        protocol: what all of them share; more than the estimate's own text where that leaves something out.
        unit, n: what it is counted in, over how many examples.
        beta: of an ``objective``; else None.
        better: which end is the better one; None where there is none.
        cells: by run.
        best: the run that is better than every other by more than ``MARK`` combined standard errors; None if none is.
    """

    metric: str
    protocol: str
    unit: str
    n: int
    beta: float | None
    better: Literal["lower", "higher"] | None
    cells: dict[str, Cell]
    best: str | None


@final
@dataclass(frozen=True)
class Note:
    """What must be said under a table, of which metrics (none: of all)."""

    metrics: list[str]
    text: str


@final
@dataclass(frozen=True)
class Table:
    """Runs whose numbers are of the same images.

    Args:
        data, split, protocol: as in ``metrics.json``.
        pixels: the protocol in words.
        images: how many the split has.
        sha256: of the images as they were scored.
        runs: their names, in the order given.
        rows, notes: what it says.
    """

    data: str
    split: str
    protocol: str
    pixels: str
    images: int
    sha256: str
    runs: list[str]
    rows: list[Row]
    notes: list[Note]


@final
@dataclass(frozen=True)
class Comparison:
    """All that ``vaelab compare`` prints.

    Args:
        runs: one record a run, see ``Measured.about``.
        settings: those that differ: by name, then by run; a run that has no such setting is left out.
        training_sets: which runs of one data set were trained on different images of it.
        tables: the numbers.
        apart: why there is more than one table.
    """

    runs: list[dict[str, Any]]
    settings: dict[str, dict[str, Any]]
    training_sets: list[str]
    tables: list[Table]
    apart: list[str]


# --- reading --------------------------------------------------------------------------------------------------------


def gather(paths: Sequence[Path]) -> list[Measured]:
    """Open runs that were evaluated.

    Raises:
        UsageError: if there are fewer than two, one is given twice, holds no run or was never evaluated.
        FailureError: if files are damaged, of another format, or do not belong together.
    """
    if len(paths) < 2:
        raise UsageError("compare takes two runs or more: vaelab compare RUN RUN ...")
    seen: dict[Path, Path] = {}
    for path in paths:
        real = path.resolve()
        if real in seen:
            same = f"{seen[real]} and {path} are the same run" if seen[real] != path else f"{path} is given twice"
            raise UsageError(f"{same}: compare takes different ones")
        seen[real] = path
    return [_measured(name, path) for name, path in zip(_names(list(seen)), paths, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that differ from each other."""
    deepest = max(len(path.parts) for path in paths)
    for depth in range(1, deepest):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _measured(name: str, path: Path) -> Measured:
    folder = RunFolder.open(path)
    config, run, history = folder.config(), folder.run, folder.history()
    needed = {"epoch", "seconds", "validation_distortion"}
    if not history or not all(needed <= record.keys() for record in history):
        raise FailureError(f"{path / 'history.jsonl'} is missing or incomplete: {path} cannot be compared")
    model, places = load_model(path), _places(path, config["data"])
    return Measured(name, path, run, config["data"], config["resolved"], history, model, places)


def _places(path: Path, record: Mapping[str, Any]) -> dict[tuple[str, str], Place]:
    """What a run's ``metrics.json`` holds, after checking that it is of this run as it is now."""
    file, weights = path / "metrics.json", path / "best_model.pth"
    again = f"run vaelab evaluate {path}"
    if not file.exists():
        raise UsageError(f"{path} has no metrics.json: {again} first")
    content = read_json(file)
    if content.get("format") != FORMAT:
        of = f"is of format {content['format']}" if "format" in content else "is without a format"
        raise FailureError(f"{file} {of}; vaelab {__version__} compares format {FORMAT}: {again} again")
    if content.get("weights_sha256") != RunFolder(path).weights_sha256():
        raise FailureError(f"{weights} has changed since {file} was written: {again} again")
    if content.get("data") != record:
        raise FailureError(f"{file} is of other data than config.json says: {again} again")
    try:
        found = {(split, protocol): _place(place) for split, under in content["splits"].items()
                 for protocol, place in under.items() if place["metrics"]}  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FailureError(f"{file} is damaged ({reason}): remove it, then {again} again") from error
    if not found:
        raise UsageError(f"{file} holds no numbers: {again} first")
    return found


def _place(content: Mapping[str, Any]) -> Place:
    about = content.get("about", {})
    scores = {metric: _estimate(estimate) for metric, estimate in content["metrics"].items()}
    floor = float(about["cross_entropy_floor"]) if "cross_entropy_floor" in about else None
    return Place(scores, str(about["images_sha256"]), str(about["train_sha256"]), floor)


def _estimate(content: Mapping[str, Any]) -> Estimate:
    value, stderr = float(content["value"]), content["stderr"]
    if not math.isfinite(value):
        raise ValueError(f"a value of {value}")
    unit, n, protocol = content["unit"], int(content["n"]), content["protocol"]
    if not isinstance(unit, str) or not isinstance(protocol, str):
        raise TypeError("unit and protocol must be words")
    return Estimate(value, math.nan if stderr is None else float(stderr), unit, n, protocol)


# --- comparing ------------------------------------------------------------------------------------------------------


def compare(runs: Sequence[Measured]) -> Comparison:
    """Put runs side by side, as far as they can be compared."""
    places = dict.fromkeys((run.record["data"], *place) for run in runs for place in run.places)
    tables = [table for place in places for table in _tables(runs, *place)]
    apart = [_why(max(tables[:i], key=lambda other: _agreement(other, table)), table)
             for i, table in enumerate(tables) if i > 0]  # fmt: skip
    return Comparison([run.about() for run in runs], _differences(runs), _training_sets(runs), tables, apart)


def _tables(runs: Sequence[Measured], data: str, split: str, protocol: str) -> list[Table]:
    """The tables of one split under one protocol: one for each set of runs that share images and at least one row."""
    place = (split, protocol)
    here = [run for run in runs if run.record["data"] == data and place in run.places]
    found: list[Table] = []
    for sha256 in dict.fromkeys(run.places[place].images for run in here):
        same = [run for run in here if run.places[place].images == sha256]
        rows = _rows(same, place)
        for names in _connected([run.name for run in same], rows):
            members = [run for run in same if run.name in names]
            own = [row for row in rows if row.cells.keys() <= names]
            binary = any(", binary pixels" in row.protocol for row in own)
            words = "binary pixels" if binary else pixels(protocol, members[0].record["shape"][0])
            notes = _notes(own, {floor for run in members if (floor := run.places[place].floor) is not None})
            found.append(Table(data, split, protocol, words, members[0].record[split], sha256,
                               [run.name for run in members], own, notes))  # fmt: skip
    return found


def _rows(runs: Sequence[Measured], place: tuple[str, str]) -> list[Row]:
    found: dict[tuple[str, str, str, int, float | None], dict[str, Cell]] = {}
    for run in runs:
        for metric, e in run.places[place].scores.items():
            beta = run.run.objective.beta if metric == "objective" else None
            words = [_OF_THE_RUN.sub("", e.protocol)]
            if run.is_real and (metric in _OF_PIXELS or _importance_samples(metric)):
                words.append("density of real-valued pixels")
            if beta is not None:
                words.append(f"beta {beta:g}")
            if metric in _PROBES:
                words.append(f"train_sha256 {run.places[place].fitted}")
            remark = ", ".join(_OF_THE_RUN.findall(e.protocol))
            cell = Cell(e.value, None if math.isnan(e.stderr) else e.stderr, remark)
            found.setdefault((metric, "; ".join(words), e.unit, e.n, beta), {})[run.name] = cell
    families = list(dict.fromkeys(re.sub(r"\d+$", "", key[0]) for key in found))  # all nll_k stand together, by k
    ordered = sorted(found, key=lambda k: (families.index(re.sub(r"\d+$", "", k[0])), _importance_samples(k[0])))
    return [Row(*k, _better(k[0]), found[k], _best(found[k], _better(k[0]))) for k in ordered]


def _importance_samples(metric: str) -> int:
    """The k of ``nll_k``; 0 for all other metrics."""
    found = re.fullmatch(r"nll_(\d+)", metric)
    return int(found[1]) if found else 0


def _better(metric: str) -> Literal["lower", "higher"] | None:
    if metric in _LOWER or _importance_samples(metric):
        return "lower"
    return "higher" if metric in _HIGHER else None


def _best(cells: Mapping[str, Cell], better: str | None) -> str | None:
    r"""The run that beats each other one by more than 2 :math:`\sqrt{s_1^2 + s_2^2}`; None without standard errors."""
    if better is None or len(cells) < 2 or any(cell.stderr is None for cell in cells.values()):
        return None
    sign = 1 if better == "lower" else -1
    leader = min(cells, key=lambda name: sign * cells[name].value)
    ours = cells[leader]
    gaps = [(sign * (cell.value - ours.value), math.hypot(ours.stderr or 0, cell.stderr or 0))
            for name, cell in cells.items() if name != leader]  # fmt: skip
    return leader if all(gap > MARK * noise for gap, noise in gaps) else None


def _connected(names: Sequence[str], rows: Iterable[Row]) -> list[set[str]]:
    """Sets of runs: two that share a row are in one set."""
    sets = [{name} for name in names]
    for row in rows:
        joined = set().union(*(s for s in sets if s & row.cells.keys()))
        sets = [s for s in sets if not s & joined] + [joined]
    return sorted(sets, key=lambda s: min(names.index(name) for name in s))


# --- what must be said ----------------------------------------------------------------------------------------------


def _notes(rows: Sequence[Row], floors: set[float]) -> list[Note]:
    split_rows: dict[str, list[str]] = {}
    for metric in dict.fromkeys(row.metric for row in rows):
        of_metric = [row for row in rows if row.metric == metric]
        if len(of_metric) > 1:
            split_rows.setdefault(_distinctions(of_metric), []).append(metric)
    notes = [Note(metrics, f"different protocols, so different rows ({text})") for text, metrics in split_rows.items()]
    for row in rows:
        remarks = [f"{name} {cell.remark}" for name, cell in row.cells.items() if cell.remark]
        notes += [Note([row.metric], ", ".join(remarks))] if remarks else []
    most: dict[str, int] = {}
    for row in rows:
        for name in row.cells:
            most[name] = max(most.get(name, 0), _importance_samples(row.metric))
    counts = {k: [name for name in most if most[name] == k] for k in sorted(set(most.values())) if k}
    if len(counts) > 1:
        said = ", ".join(f"k={k} ({', '.join(names)})" for k, names in counts.items())
        notes.append(Note([], f"IWAE bounds with other k are other bounds: {said}; only equal k share a row."))
    if any(CAVEAT in row.protocol for row in rows):
        least = f", and cannot go below {min(floors):.2f} nats here" if len(floors) == 1 else ""
        notes.append(Note([], f"A cross-entropy on pixels that are not binary is no likelihood{least}."))
    return notes


def _distinctions(rows: Sequence[Row]) -> str:
    """In what the protocols of these rows differ, by run."""
    parts = [[*re.split(r"[,;] ", row.protocol), f"n={row.n:,}"] for row in rows]
    common = set(parts[0]).intersection(*parts[1:])
    said = [", ".join(part for part in own if part not in common) or "not so" for own in parts]
    return "; ".join(f"{', '.join(row.cells)}: {what}" for row, what in zip(rows, said, strict=True))


def _agreement(one: Table, other: Table) -> int:
    """How many of data set, split, pixels, images agree before the first that differs."""
    names = ("data", "split", "protocol", "sha256")
    return next((i for i, name in enumerate(names) if getattr(one, name) != getattr(other, name)), len(names))


def _why(one: Table, other: Table) -> str:
    """Why two tables are apart: the first thing that differs, and what it means."""
    depth = _agreement(one, other)
    a, b = ((t.data, f"{t.data} {t.split}", f"{t.data} {t.split}, {t.pixels}")[min(depth, 2)] for t in (one, other))
    ours, theirs = ", ".join(one.runs), ", ".join(other.runs)
    cross_entropy = any(CAVEAT in row.protocol for t in (one, other) for row in t.rows)
    reason = [
        "different data sets",
        "different images",
        "a cross-entropy on pixels that are not binary is no likelihood" if cross_entropy
        else "other pixels are other data",
        f"scored on different images: {one.split}_sha256 differ ({one.sha256[:8]}, {other.sha256[:8]})",
        "no number of the same protocol in common",
    ][depth]  # fmt: skip
    if depth > 2:
        return f"{ours} and {theirs}: {a}: {reason}"
    if ours == theirs:
        return f"{a} and {b}: {reason}"
    return f"{ours}: {a}; {theirs}: {b}: {reason}"


def _training_sets(runs: Sequence[Measured]) -> list[str]:
    """Runs of one data set that were trained on different images of it: their test numbers may be compared still."""
    hashes: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run in runs:
        # Under "dynamic" the training images are kept grey.
        kept = "grey" if run.record["protocol"] == "dynamic" else run.record["protocol"]
        of_kind = hashes.setdefault((run.record["data"], kept), {})
        of_kind.setdefault(run.record["train_sha256"], []).append(run.name)
    said = [(data, [f"{', '.join(names)}: {sha256[:8]}" for sha256, names in found.items()])
            for (data, _), found in hashes.items()]  # fmt: skip
    return [f"Trained on different images of {data}: train_sha256 differ ({'; '.join(sets)})."
            for data, sets in said if len(sets) > 1]  # fmt: skip


def _differences(runs: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    settings = {run.name: run.settings() for run in runs}
    names = dict.fromkeys(name for values in settings.values() for name in values)
    found = {name: {run: values[name] for run, values in settings.items() if name in values} for name in names}
    return {
        name: values
        for name, values in found.items()
        if name not in ("seed", "epochs") and (len(values) < len(runs) or len({str(v) for v in values.values()}) > 1)
    }
