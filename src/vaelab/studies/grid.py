"""A folder that holds a grid of runs: which are wanted, what is to be done next for each, and what they measured.

Every run of the grid is an ordinary run folder (``d08-b1-s0``: 8 dimensions, beta 1, seed 0). What is left to do is
read off the folders, so that an interruption loses nothing and a larger grid adds to what is there.

Shapes: N images of the validation split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from vaelab.config import Run, flat, override
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate.importance import sample_counts
from vaelab.measuring.kept import Kept, importance_key
from vaelab.recipes import flags_of
from vaelab.runs.checkpoint import read_json
from vaelab.runs.folder import RunFolder
from vaelab.slots import parts_of
from vaelab.studies.recommend import Setting

SPLIT = "validation"
NEEDED = ("negative_elbo", "distortion", "rate")
MEANS = (*NEEDED, "active_units", "mutual_information")  # a flow has no active units, a planar one no information

Stage = Literal["train", "measure"]


@final
@dataclass(frozen=True, order=True)
class Point:
    """One run of the grid; sorted by seed first, so that the first part of a grid covers all its settings."""

    seed: int
    latent_dim: int
    beta: float

    @property
    def name(self) -> str:
        """The run folder's name.

        Example:
            >>> Point(0, 8, 0.5).name
            'd08-b0.5-s0'
        """
        beta = f"{self.beta:g}" if float(f"{self.beta:g}") == self.beta else repr(self.beta)
        return f"d{self.latent_dim:02d}-b{beta}-s{self.seed}"


def cross(latent_dims: Iterable[int], betas: Iterable[float], seeds: int) -> tuple[Point, ...]:
    """All runs of a grid, each once, with the seeds 0, 1, ..."""
    sizes, betas = set(latent_dims), set(betas)
    return tuple(sorted(Point(seed, size, beta) for seed in range(seeds) for size in sizes for beta in betas))


@final
@dataclass(frozen=True)
class Grid:
    """Runs in one folder that differ in latent size, beta and seed alone.

    Args:
        base: what all runs share.
        wanted: the runs that are asked for.
        out: the folder.
        num_samples: importance samples per image.
    """

    base: Run
    wanted: tuple[Point, ...]
    out: Path
    num_samples: int

    def run(self, point: Point) -> Run:
        """The run of a point.

        Raises:
            UsageError: if runs of the recipe have no latent size, or no beta and it is not 1.
        """
        changes: dict[str, float] = {"latent_dim": point.latent_dim, "seed": point.seed}
        if "beta" in flat(self.base):
            changes["beta"] = point.beta
        elif point.beta != 1:
            raise UsageError(f"--betas {point.beta:g}: {self.base.recipe} has no --beta: leave --betas out")
        return override(self.base, **changes)

    def path(self, point: Point) -> Path:
        """The run folder of a point."""
        return self.out / point.name

    def log(self, point: Point) -> Path:
        """The file that a point's processes write what they have to say to."""
        return self.out / f"{point.name}.log"

    def points(self) -> list[Point]:
        """The runs that are wanted, and those that grids before this one have trained in the folder."""
        found: list[Point] = []
        for path in self.out.glob("d*-b*-s*/config.json"):
            if matched := re.fullmatch(r"d(\d+)-b([0-9.e+-]+)-s(\d+)", path.parent.name):
                point = Point(int(matched[3]), int(matched[1]), float(matched[2]))
                if point not in self.wanted and self.stage(point) != "train":
                    found.append(point)
        return sorted({*self.wanted, *found})

    def stage(self, point: Point) -> Stage | None:
        """What is to be done next for a point; None if nothing is.

        Raises:
            UsageError: if its folder holds a run of other settings, or there is no such run.
        """
        path = self.path(point)
        if not (path / "config.json").exists():
            return "train"
        folder = RunFolder.open(path)
        try:
            folder.reconcile(self.run(point))
            trained = _is_trained(folder)
        except FailureError:  # a damaged file: the process that goes on with the run will say which
            trained = False
        if not trained:
            return "train"
        return "measure" if self.metrics(point) is None else None

    def metrics(self, point: Point) -> dict[str, Any] | None:
        """What ``metrics.json`` has of a point, if it is of these weights, this number of samples and all images."""
        path = self.path(point)
        try:
            content = read_json(path / "metrics.json")
        except FailureError:  # not there, or damaged, which the process that measures will say
            return None
        place = content.get("splits", {}).get(SPLIT, {}).get(self.base.data.protocol, {})
        found = place.get("metrics", {})
        # Codes are looked at last; what is undefined of them is no metric, but their dimensions are always listed.
        complete = {self.bound, *NEEDED} <= found.keys() and "per_dimension" in place
        complete = complete and found[self.bound]["n"] == content["data"][SPLIT]  # a user may have measured a few
        return found if complete and content.get("weights_sha256") == RunFolder(path).weights_sha256() else None

    @property
    def bound(self) -> str:
        """The measure that settings are compared by."""
        return f"nll_{self.num_samples}"

    def command(self, point: Point, stage: Stage) -> list[str]:
        """The command line of a stage, after ``vaelab``."""
        path = str(self.path(point))
        if stage == "measure":
            only = ["--split", SPLIT, "--num-samples", str(self.num_samples), "--only", "elbo", "nll", "latents"]
            return [*parts_of(self.base), "evaluate", path, *only, "--threads", "1"]
        begin = [*parts_of(self.base), "train", self.base.recipe, "--out", path, "--threads", "1"]
        if (self.path(point) / "config.json").exists():
            return [*begin, "--resume"]
        return [*begin, *flags_of(self.run(point))]

    def settings(self, points: Iterable[Point]) -> tuple[list[Setting], str]:
        """What these points measured, by size and beta, and the protocol of it."""
        groups: dict[tuple[int, float], list[Point]] = {}
        for point in sorted(points):
            groups.setdefault((point.latent_dim, point.beta), []).append(point)
        settings: list[Setting] = []
        protocol = ""
        for (latent_dim, beta), group in sorted(groups.items()):
            metrics = {point: found for point in group if (found := self.metrics(point)) is not None}
            bounds = [found[self.bound] for found in metrics.values()]
            protocol = bounds[0]["protocol"]
            values = np.array([bound["value"] for bound in bounds])
            images = [self._images(point, found[self.bound]) for point, found in metrics.items()]
            whole = [rows for rows in images if rows is not None]
            mean = np.mean(whole, 0) if len(whole) == len(images) else None
            error = np.mean([b["stderr"] for b in bounds]) if mean is None else mean.std(ddof=1) / np.sqrt(len(mean))
            defined = [name for name in MEANS if all(name in found for found in metrics.values())]
            means = {name: float(np.mean([found[name]["value"] for found in metrics.values()])) for name in defined}
            codes = [found["mutual_information"]["n"] for found in metrics.values() if "mutual_information" in defined]
            means["seconds"] = float(np.mean([_seconds(RunFolder(self.path(point))) for point in metrics]))
            slack = float(np.mean([_slack(found, self.num_samples) for found in metrics.values()]))
            settings.append(Setting(
                latent_dim, beta, len(values), float(values.mean()), float(error), images=mean,
                spread=float(values.std(ddof=1)) if len(values) > 1 else float("nan"), slack=slack,
                codes=min(codes, default=0), means=means, has_beta="beta" in flat(self.base),
            ))  # fmt: skip
        return settings, protocol

    def _images(self, point: Point, reported: dict[str, Any]) -> NDArray[np.float64] | None:
        """-log p(x) of every image, (N,), if ``evaluation.pt`` has the values that the reported mean is made of."""
        content = read_json(self.path(point) / "metrics.json")
        kept = Kept(self.path(point) / "evaluation.pt", content["weights_sha256"])
        images_hash = content["data"][f"{SPLIT}_sha256"]
        for bf16 in (False, True):
            key = importance_key(SPLIT, self.base.data.protocol, images_hash, self.num_samples, bf16=bf16)
            nll = -kept.get(key).get(f"k={self.num_samples}", np.empty(0))[: reported["n"]]
            if len(nll) == reported["n"] and np.isclose(nll.mean(), reported["value"], rtol=1e-9):
                return nll
        return None


def _is_trained(folder: RunFolder) -> bool:
    state = folder.load_last()
    if state is None or not (folder.path / "best_model.pth").exists():
        return False
    total = folder.run.training.epochs * folder.config()["resolved"]["steps_per_epoch"]
    return bool(state["stopped"]) or state["step"] >= total


def _seconds(folder: RunFolder) -> float:
    return sum(record["seconds"] for record in folder.history())


def _slack(metrics: dict[str, Any], num_samples: int) -> float:
    """By how much the bound would still fall with more samples, if it falls as 1/k does: from its last two k."""
    if len(counts := sample_counts(num_samples)) < 2:
        return 0.0
    fewer, more = counts[-2:]
    above, below = (metrics[f"nll_{k}"]["value"] for k in (fewer, more))
    return (above - below) / (more / fewer - 1)
