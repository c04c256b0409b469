"""``vaelab reproduce``."""

from __future__ import annotations

import dataclasses
import json as json_
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from vaelab.cli.common import at_least
from vaelab.recipes import RECIPES, recipe

Recipes = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE ...", help="default: all")]


def reproduce(
    recipes: Recipes = (),
    /,
    seeds: int | None = None,
    out: Path = Path("runs/reproduce"),
    data: str | None = None,
    epochs: int | None = None,
    num_samples: int | None = None,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Run recipes and put their numbers beside the published ones; writes reproduce.md and reproduce.json.

    Each seed is an ordinary run folder, in OUT. The command can be interrupted and given again: what is finished is not
    done again, and other recipes stay in the table.

    Args:
        seeds: runs of each recipe (default: 3 where one costs less than 10 minutes, else 1, and then no s.d. is shown).
        out: the folder of all runs.
        data: another data set than the recipe's.
        epochs: other than the recipe's.
        num_samples: importance samples, where the published number is a likelihood; default: as many.
        threads: CPU threads; default: torch's.
        json: print JSON instead of a table.
    """
    from vaelab.progress import Bar
    from vaelab.runs.checkpoint import write_bytes, write_json
    from vaelab.studies import reproduce as work

    names = tuple(dict.fromkeys(recipes)) or tuple(RECIPES)
    for name in names:
        recipe(name)  # raises for a name that is none, before hours are spent on the others
    at_least(1, seeds=seeds, epochs=epochs, num_samples=num_samples, threads=threads)
    if data is not None and Path(data).expanduser().exists():  # the same files, from whichever folder they are named
        data = str(Path(data).expanduser().resolve())
    given = {"data": data, "epochs": epochs, "num_samples": num_samples}
    table = out / "reproduce.json"
    work.rows_before(table, names, given)  # raises before hours are spent, if it cannot be added to
    rows = work.reproduce(names, out, seeds=seeds, **given, threads=threads, bar=Bar())
    shown = [*work.rows_before(table, names, given), *rows]
    write_bytes(out / "reproduce.md", (work.markdown(shown) + "\n").encode())
    write_json(table, {"settings": given, "rows": [dataclasses.asdict(row) for row in shown]})
    if json:
        print(json_.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    printed = Table(box=None)
    for column in ("recipe", "number", "published", "measured", "unit", "minutes"):
        printed.add_column(column, justify="right" if column in ("published", "minutes") else "left")
    for row in rows:
        published = "-" if row.published is None else f"{row.published:.2f}"
        printed.add_row(row.recipe, row.metric, published, row.measured, row.unit, f"{row.minutes:.1f}")
    console = Console(highlight=False, markup=False)
    console.print(printed)
    console.print(f"with protocols: {out / 'reproduce.md'}, {table}", soft_wrap=True)
