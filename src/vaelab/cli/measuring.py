"""Commands that measure: ``evaluate``."""

from __future__ import annotations

import dataclasses
import json as json_
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from vaelab.cli.common import RunPath
from vaelab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from vaelab.measure import Plan

# What a reader sees, in this order; a name that ends in _ stands for all that begin so.
LABELS = {
    "negative_elbo": "-ELBO (distortion + rate)",
    "distortion": "distortion, -log p(x|z)",
    "rate": "rate, KL(q(z|x) || p(z))",
    "objective": "distortion + {beta:g} rate",
    "bits_per_dim": "-ELBO in bits a dimension",
    "nll_": "-log p(x) <=, IWAE k={}",
    "ess": "effective sample size",
    "nll_ais": "-log p(x) <=, AIS",
    "ais_ess": "  effective chains",
    "ais_acceptance": "  acceptance of its moves",
    "bdmc_lower": "simulated: log p(x) >=",
    "bdmc_upper": "simulated: log p(x) <=",
    "bdmc_gap": "simulated: BDMC gap",
    "active_units": "active units",
    "mutual_information": "mutual information I(x; z)",
    "aggregate_kl": "KL(q(z) || p(z))",
    "two_sample_accuracy": "telling q(z) from p(z)",
    "linear_probe": "linear probe of the codes",
    "knn_probe": "5 nearest neighbours of the codes",
    "psnr": "reconstruction PSNR",
    "ssim": "reconstruction SSIM",
    "ais_gain": "  tighter than IWAE by",
    "frechet": "Fréchet distance of samples",
    "frechet_floor": "  of real images (floor)",
    "precision": "precision of samples",
    "recall": "recall of samples",
}


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

    An evaluation that was interrupted goes on where it was when the command is given again.

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
    from vaelab.measure import measure
    from vaelab.progress import Bar

    if memory < 1:
        raise UsageError(f"--memory {memory}: must be at least 1 (MiB)")
    annealing = {"images": ais_images, "chains": ais_chains, "distributions": ais_steps, "start": ais_start}
    settings = {"split": split, "protocols": protocol, "num_samples": num_samples, "rows": rows, "device": device,
                "memory": memory * 2**20, "precision": precision, "threads": threads}  # fmt: skip
    plan = _plan(preset or "paper", only, ais, settings, annealing)
    content = measure(run, plan, Bar())
    if json:
        print(json_.dumps(content, indent=2))
    else:
        _print(str(run), content, plan)


def _plan(preset: str, only: Sequence[str], ais: bool, settings: dict[str, Any], annealing: dict[str, Any]) -> Plan:
    """The preset's plan with what was given in place of its own."""
    from vaelab.measure import PARTS, PRESETS, Part

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
    console = Console()
    for protocol, found in content["splits"][plan.split].items():
        if plan.protocols and protocol not in plan.protocols:
            continue
        size = content["data"][plan.split]
        title = f"{name}: {content['data']['data']} {plan.split} ({size:,} images), {protocol}"
        table = Table(box=None, title=title, title_justify="left", title_style="bold")
        for column in ("", "value", "s.e.", "unit", "n"):
            table.add_column(column, justify="left" if column in ("", "unit") else "right")
        for key, estimate in found["metrics"].items():
            unit = estimate["unit"].partition(" (")[0]
            table.add_row(_label(key, content["beta"]), *_cells(estimate), unit, f"{estimate['n']:,}")
        console.print(table, highlight=False)
        for note in _notes(found):
            console.print(note, highlight=False, soft_wrap=True)
        console.print()


def _label(key: str, beta: float) -> str:
    if key in LABELS:
        return LABELS[key].format(beta=beta)
    stem, _, number = key.rpartition("_")
    return LABELS.get(f"{stem}_", key).format(number)


def _cells(estimate: dict[str, Any]) -> tuple[str, str]:
    """Value and standard error, with as many places as the error has something to say about."""
    value, stderr = estimate["value"], estimate["stderr"]
    places = 2 if abs(value) >= 5 or estimate["unit"] in ("nats", "units") else 4
    return f"{value:.{places}f}", "-" if stderr is None else f"{stderr:.{places}f}"


def _notes(found: dict[str, Any]) -> list[str]:
    """What must be said beside the numbers."""
    notes: list[str] = []
    floor = found.get("about", {}).get("cross_entropy_floor")
    if floor is not None:
        notes.append(f"Cross-entropy on grey pixels is no likelihood, and cannot go below {floor:.2f} nats here "
                     "(the mean entropy of the pixels).")  # fmt: skip
    information = found["metrics"].get("mutual_information")
    if information is not None:
        about = information["protocol"]
        notes.append(f"Mutual information and KL(q(z) || p(z)) are of the {about[about.index('aggregate of') :]}.")
    return notes
