"""Commands that measure: ``evaluate``."""

from __future__ import annotations

import dataclasses
import json as json_
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from vaelab.cli.common import RunPath, at_least
from vaelab.errors import UsageError, did_you_mean
from vaelab.labels import notes, rows_of, title

if TYPE_CHECKING:
    from vaelab.measuring.measure import Plan


def evaluate(
    run: RunPath,
    /,
    split: str = "test",
    num_samples: int | None = None,
    preset: Literal["quick", "paper"] | None = None,
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROTOCOL ...")] = (),
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART ...")] = (),
    rows: int | None = None,
    ais: bool = False,
    ais_images: int | None = None,
    ais_chains: int | None = None,
    ais_steps: int | None = None,
    ais_start: Literal["encoder", "prior"] | None = None,
    memory: int = 1024,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Measure a run: likelihoods, codes, pictures, each number with protocol and standard error; writes metrics.json.

    An evaluation that was interrupted goes on where it was when the command is given again; annealing at its last block
    of 16 to 32 images a thread.

    Args:
        split: the images to score: train, validation or test.
        num_samples: importance samples per image (default: the preset's).
        preset: quick: 500 importance samples; paper (the default): 5000, and 10,000 distributions for --ais.
        protocol: grey, dynamic, static, threshold: what is done to the pixels. Default: as the run was trained, and
            dynamic besides where a likelihood needs binary pixels.
        only: parts to measure: elbo, nll, latents, reconstruction, samples, ais (default: all but ais).
        rows: importance-sample only the first so many images.
        ais: annealed importance sampling too: a closer bound than importance sampling, at a price.
        ais_images: how many images, from the first on (default: 1000).
        ais_chains: chains per image (default: 16).
        ais_steps: distributions from start to end (default: the preset's).
        ais_start: where chains start (default: encoder).
        memory: MiB that activations may take.
        precision: arithmetic of the importance sampler's products; auto: bf16 where the processor is fast at it.
        device: cpu, cuda, mps; auto takes a GPU if there is one.
        threads: CPU threads; default: torch's.
        json: print JSON instead of tables.
    """
    from vaelab.measuring.measure import measure
    from vaelab.progress import Bar

    at_least(1, memory=memory, num_samples=num_samples, rows=rows, ais_images=ais_images, ais_chains=ais_chains,
             threads=threads)  # fmt: skip
    at_least(2, ais_steps=ais_steps)
    annealing = {"num_chains": ais_chains, "num_distributions": ais_steps, "start": ais_start}
    settings = {"split": split, "protocols": protocol, "num_samples": num_samples, "rows": rows, "device": device,
                "memory": memory * 2**20, "precision": precision, "threads": threads,
                "ais_images": ais_images}  # fmt: skip
    plan = _plan(preset or "paper", only, ais, settings, annealing)
    content = measure(run, plan, Bar())
    if json:
        print(json_.dumps(content, indent=2))
    else:
        _print(str(run), content, plan)


def _plan(preset: str, only: Sequence[str], ais: bool, settings: dict[str, Any], annealing: dict[str, Any]) -> Plan:
    """The preset's plan with what was given in place of its own."""
    from vaelab.measuring.measure import PARTS, PRESETS, Part

    known: tuple[Part, ...] = (*PARTS, "ais")
    for word in only:
        if word not in known:
            raise UsageError(f"--only {word}: no such part{did_you_mean(word, known)}")
    _word("--split", settings["split"], ("train", "validation", "test"))
    for protocol in settings["protocols"]:
        _word("--protocol", protocol, ("grey", "dynamic", "static", "threshold"))
    base = PRESETS[preset]
    return dataclasses.replace(
        base,
        parts=tuple(part for part in known if part in (only or PARTS) or (part == "ais" and ais)),
        annealing=dataclasses.replace(base.annealing, **{k: v for k, v in annealing.items() if v is not None}),
        **{k: v for k, v in settings.items() if v is not None},
    )


def _word(flag: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UsageError(f"{flag} {word}: there is {', '.join(known)}{did_you_mean(word, known)}")


def _print(name: str, content: dict[str, Any], plan: Plan) -> None:
    console = Console(highlight=False, markup=False)
    for protocol, found in content["splits"][plan.split].items():
        if plan.protocols and protocol not in plan.protocols:
            continue
        heading = f"{name}: {title(content['data'], plan.split, protocol, found)}"
        console.print(heading, style="bold", soft_wrap=True)  # a table's own title would be folded to its width
        table = Table(box=None)
        for column in ("", "value", "s.e.", "unit", "n"):
            table.add_column(column, justify="left" if column in ("", "unit") else "right", overflow="fold")
        for row in rows_of(found["metrics"], content["beta"]).values():
            table.add_row(row.name, row.value, row.stderr or "-", row.unit, row.n)
        console.print(table)
        for note in notes(found):
            console.print(note, soft_wrap=True)
        console.print()
