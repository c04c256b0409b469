"""``vaelab tune-latent``."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from vaelab.cli.common import at_least
from vaelab.errors import FailureError, UsageError
from vaelab.labels import duration

if TYPE_CHECKING:
    from vaelab.studies.tuning import Result

DataSource = Annotated[
    Positional[str], tyro.conf.arg(metavar="DATA", help="mnist, digits, freyfaces, sprites, or a path to images")
]


def tune_latent(
    data: DataSource,
    /,
    recipe: str = "mlp",
    latent_dims: Annotated[tuple[int, ...], tyro.conf.arg(metavar="D ...")] = (2, 4, 8, 16, 32, 64),
    betas: Annotated[tuple[float, ...], tyro.conf.arg(metavar="BETA ...")] = (1.0,),
    epochs: int | None = None,
    seeds: int = 1,
    jobs: int | None = None,
    num_samples: int = 500,
    protocol: Literal["grey", "dynamic", "static", "threshold"] | None = None,
    image_size: tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    range: Literal["auto", "unit", "byte", "symmetric"] | None = None,
    out: Path | None = None,
) -> None:
    """Choose the latent size and beta: train a grid of runs, compare their likelihoods on validation, recommend one.

    Each run is an ordinary run folder, in OUT. The command can be interrupted and given again: what is finished is not
    done again, and a larger grid adds to it. Writes OUT/tuning.json and OUT/tuning.png.

    Args:
        recipe: what to train; vaelab recipes lists them.
        latent_dims: the latent sizes to compare.
        betas: the values of --beta to compare, in place of the recipe's, e.g. 0.5 1 2 4: weights on the rate, or, of
            the objective tc, on the total correlation.
        epochs: of each run (default: the recipe's).
        seeds: runs of each setting; from 2 on, the standard errors include what training alone changes.
        jobs: runs at a time, one thread each (default: as many as there are cores).
        num_samples: importance samples per image.
        protocol: what is done to the pixels (default: as the recipe does where that has a likelihood, else dynamic).
        image_size: height and width that a folder's images are brought to.
        channels: 1: grey, 3: colour (default: as the images are).
        range: what an array's values mean: 0..1, 0..255 or -1..1.
        out: the folder of all runs (default: runs/tune-DATA-RECIPE).
    """
    _check(latent_dims, betas)
    at_least(1, epochs=epochs, seeds=seeds, jobs=jobs, num_samples=num_samples)
    from vaelab.progress import Bar
    from vaelab.studies.grid import Grid, cross
    from vaelab.studies.tuning import plan, tune

    given = {"protocol": protocol, "image_size": image_size, "channels": channels, "range": range, "epochs": epochs}
    base, loaded = plan(recipe, data, **given)
    folder = out or Path(f"runs/tune-{Path(data).stem}-{recipe}")
    grid = Grid(base, cross(latent_dims, betas, seeds), folder, num_samples)
    result = tune(grid, loaded, jobs or _cores(), Bar())
    _print(result, recipe, folder)
    if result.failures:
        names = ", ".join(sorted(result.failures))
        count = "1 run" if len(result.failures) == 1 else f"{len(result.failures)} runs"
        raise FailureError(f"{count} failed: {names}; all others are kept: the same command tries what failed again")


def _check(sizes: tuple[int, ...], betas: tuple[float, ...]) -> None:
    if not sizes or not betas:
        raise UsageError(f"{'--betas' if sizes else '--latent-dims'}: the grid is empty, give at least one value")
    for size in sizes:
        at_least(1, latent_dims=size)
    for beta in betas:
        if not (math.isfinite(beta) and beta >= 0):
            raise UsageError(f"--betas {beta:g}: must be a finite number of at least 0")


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _print(result: Result, recipe: str, folder: Path) -> None:
    advice = result.recommendation
    if advice is None:
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120  # a file has room for all columns
    seeds = sorted({s.seeds for s in result.settings})
    each = f"; {seeds[0]} seeds each" if len(seeds) == 1 and seeds[0] > 1 else ""
    console.print(f"{recipe} on {result.protocol}; nats per image{each}", style="bold", soft_wrap=True)
    hidden = ({"seeds"} if len(seeds) == 1 else set[str]()) | ({"s.d."} if seeds == [1] else set[str]())
    table = Table(box=None, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for s, above in zip(result.settings, advice.above, strict=True):
        m = s.means
        cells = {
            "size": str(s.latent_dim),
            "beta": f"{s.beta:g}",
            "seeds": str(s.seeds),
            "-log p(x)": f"{s.nll:.2f} ±{s.stderr:.2f}",
            "above best": "-" if s is advice.best else f"{above.value:.2f} ±{above.stderr:.2f}",
            "s.d.": "-" if math.isnan(s.spread) else f"{s.spread:.2f}",
            "-ELBO": f"{m['negative_elbo']:.2f}",
            "distortion": f"{m['distortion']:.2f}",
            "rate": f"{m['rate']:.2f}",
            "active": f"{m['active_units']:.3g}" if "active_units" in m else "-",
            "I(x;z)": f"{m['mutual_information']:.2f}" if "mutual_information" in m else "-",
            "time": duration(m["seconds"]),
        }
        shown = {name: cell for name, cell in cells.items() if name not in hidden}
        if not table.columns:
            for name in shown:
                table.add_column(name, justify="right")
        table.add_row(*shown.values(), style="bold" if s is advice.chosen else None)
    console.print(table)
    near = [s.codes for s in result.settings if s.codes and s.means["mutual_information"] > math.log(s.codes) - 0.5]
    if near:
        most = f"log {near[0]:,} = {math.log(near[0]):.2f}"
        console.print(f"I(x;z) is measured on {near[0]:,} codes, and cannot exceed {most}.", soft_wrap=True)
    console.print()
    for i, reason in enumerate(advice.reasons):
        console.print(reason, style="" if i else "bold", soft_wrap=True)
    files = "\n".join(str(folder / name) for name in ("tuning.json", "tuning.png"))
    console.print(f"\n{files}", soft_wrap=True)
