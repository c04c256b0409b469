"""The tables in docs/ and README.md, made from the committed JSON.

    python benchmarks/tables.py collect RUN ...   copy what an evaluated run measured to benchmarks/results/mnist/
    python benchmarks/tables.py collect RUN=NAME  the same of a recipe with other settings, under another name
    python benchmarks/tables.py render            write the tables into the pages, between their markers

A page holds ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between is replaced.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aevb
from parts import SLOTS, parts_table
from training import SIDES, seconds
from vaelab.config import Run
from vaelab.data import load
from vaelab.diagnose import diagnose, examine
from vaelab.errors import FailureError
from vaelab.recipes import RECIPES
from vaelab.recipes.systems import RECIPES as SYSTEMS
from vaelab.report import command_of
from vaelab.runs.checkpoint import write_json
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import load_model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/improving.md", "docs/theory.md", "docs/doctor.md",
         "docs/performance.md", "docs/parts.md", "docs/aevb.md")  # fmt: skip

VARIANTS = {"burda-dreg-short": "burda-dreg"}
"""Recipes that were measured with other settings too, by the name of the result."""


def collect(path: Path, name: str = "") -> None:
    """Copy what a run measured on the test split, and what the doctor says of it, under a name or its recipe's."""
    folder = RunFolder.open(path)
    measured = json.loads((path / "metrics.json").read_text())
    if "test" not in measured["splits"]:
        raise FailureError(f"{path}/metrics.json has no test numbers: run vaelab evaluate {path}")
    about = {key: measured[key] for key in ("recipe", "beta", "data", "weights_sha256")}
    run = folder.run
    findings = diagnose(examine(run, load_model(path), load(run.data), folder.history(), folder.failure()))
    history, config, state = folder.history(), folder.config(), folder.load_last()
    refit = config.get("refit")
    if state is None or state["best"] is None:
        raise FailureError(f"{path} has no best epoch: its run is not finished")
    best = history[state["best"][1] - 1]
    result = {
        "command": command(folder.run) if refit is None else refit["command"],
        **({} if refit is None else {"refit": refit}),
        "epochs": history[-1]["epoch"],
        "best_epoch": best["epoch"],
        "validation": {key: best[f"validation_{key}"] for key in ("loss", *run.objective.terms)},
        "seconds": round(sum(r["seconds"] for r in history)),
        "cpu_seconds": round(sum(r["cpu_seconds"] for r in history)) if "cpu_seconds" in history[-1] else None,
        "median_epoch_seconds": statistics.median(r["seconds"] for r in history),
        "images_per_second": statistics.median(r["images_per_second"] for r in history),
        "curve": curve(history),
        "seed": folder.run.training.seed,
        "resolved": config["resolved"],
        "vaelab": config["vaelab"],
        **about,
        "test": measured["splits"]["test"],
        "doctor": [dataclasses.asdict(finding) for finding in findings],
    }
    default = folder.run.recipe if refit is None else f"{folder.run.recipe}-{refit['after']['prior']}"
    write_json(RESULTS / "mnist" / f"{name or default}.json", result)


def curve(history: list[dict[str, Any]], points: int = 10) -> list[dict[str, float]]:
    """The validation loss over the training: epoch, minutes of processor time, nats; the last point is the end."""
    spent = list(itertools.accumulate(r.get("cpu_seconds", 0.0) for r in history))
    chosen = sorted({round(len(history) * (i + 1) / points) for i in range(points)} - {0})
    return [{"epoch": e, "cpu_minutes": round(spent[e - 1] / 60, 1),
             "validation_loss": round(history[e - 1]["validation_loss"], 2)} for e in chosen]  # fmt: skip


def command(run: Run) -> str:
    """The command line that gives this run, but for its folder."""
    return command_of(run, "RUN").removesuffix(" --out RUN")


def render() -> None:
    """Write all tables into their pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def anew(match: re.Match[str]) -> str:
        try:
            made = TABLES[match[1]]()
        except FileNotFoundError:
            made = "(not measured yet)"
        return f"<!-- table: {match[1]} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", anew, text, flags=re.S)


def recipes_table() -> str:
    """The five systems and ``fast``, on MNIST's test set."""
    rows: list[list[str]] = []
    for name, result in _on_mnist(SYSTEMS):
        metrics, said = _own(result), SYSTEMS[name].published
        published = "–"
        if "distortion" in said:
            published = f"reconstruction {said['distortion']:.2f}, KL {said['rate']:.2f}"
        if "objective" in said:
            ours = metrics["objective"]["value"]
            published += f", weighted sum {said['objective']:.2f} (ours: {ours:.2f})"
        cells = [_cell(metrics.get(key)) for key in ("distortion", "rate", "negative_elbo")]
        threads = result["resolved"]["threads"]
        minutes = result["median_epoch_seconds"] * result["epochs"] / 60
        length = f"{minutes:.0f} min" if minutes >= 1 else f"{minutes * 60:.0f} s"
        time = f"{length} on {threads} core{'s' if threads > 1 else ''}"
        rows.append([f"`{name}`", *cells, published, str(result["epochs"]), time])
    return table(("recipe", "reconstruction", "KL", "−ELBO", "published", "epochs", "time"), rows)


def commands_table() -> str:
    """How each recipe's numbers were made."""
    rows: list[list[str]] = []
    for name, result in _on_mnist((*RECIPES, *VARIANTS)):
        resolved = result["resolved"]
        where = f"{resolved['machine']}, torch {resolved['torch']}, {resolved['precision']}"
        rows.append([f"`{name}`", f"`{result['command']}`", f"{result['best_epoch']} of {result['epochs']}",
                     f"{result['images_per_second']:,.0f}", f"{resolved['parameters']:,}", where])  # fmt: skip
    return table(("recipe", "command", "best epoch", "images/s", "parameters", "machine"), rows)


def sweep_table(name: str) -> str:
    """A sweep's rows, in nats per validation image."""
    result = _read(f"sweep-{name}")
    rows: list[list[str]] = []
    for label, row in result["rows"].items():
        numbers = (f"{row[key][0]:.2f} ± {row[key][1]:.2f}" for key in ("distortion", "rate", "negative_elbo"))
        rows.append([label, *numbers, str(row["epochs"]), str(row["seconds"])])
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    below = f"`{result['command']}`: {result['protocol']}; seed {result['seed']}; {threads}, {result['machine']}."
    return table(("", "reconstruction", "KL", "−ELBO", "epochs", "seconds"), rows, below)


def speed_table(work: str, measured: str = "training") -> str:
    """Training speed of every side that does this work (``mlp`` or ``conv``), against the first of them."""
    result = _read(measured)
    chosen = [name for name, side in SIDES.items() if side.work == work and name in result["repeats"][0]]
    rivals = [name for name in chosen if SIDES[name].peer] or chosen[:1]
    against = [f"{SIDES[name].what.partition(',')[0]} ÷ this" for name in rivals]
    score = [] if work == "conv" else ["test −ELBO"]
    start = "first epoch (s)" if score else "first 5 steps (s)"
    rows: list[list[str]] = []
    for name in chosen:
        repeats = [repeat[name] for repeat in result["repeats"]]
        cells = [SIDES[name].what, f"{statistics.median(map(seconds, repeats)):.3f}"]
        for rival in rivals:
            ratios = [seconds(repeat[rival]) / seconds(repeat[name]) for repeat in result["repeats"]]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        if score:
            bounds = [row["distortion"] + row["rate"] for row in repeats]
            spread = statistics.stdev(bounds) / len(bounds) ** 0.5 if len(bounds) > 1 else float("nan")
            cells.append(f"{statistics.mean(bounds):.2f} ± {spread:.2f}")
        cells.append(f"{statistics.median(row['seconds'][0] for row in repeats):.1f}")
        cells.append(f"{statistics.median(row['memory'] for row in repeats):.0f}")
        rows.append(cells)
    below = f"{_measured_by(result)}; medians of {len(result['repeats'])} interleaved repeats (range)."
    return table(("", "seconds an epoch", *against, *score, start, "memory (MiB)"), rows, below)


def time_table(name: str) -> str:
    """Seconds from the start of a process to a recipe's test result."""
    result = _read(f"time-{name}")
    published, gap = result["published"], result["gap"]
    rows = [["published", f"{published['distortion']:.2f}", f"{published['rate']:.2f}", "", "", ""]]
    for precision in dict.fromkeys(row["precision"] for row in result["rows"]):
        of_it = [row for row in result["rows"] if row["precision"] == precision]
        for row in of_it:
            numbers = (f"{row[key]:.2f}" for key in ("distortion", "rate"))
            times = (row["seconds"], row["imports"] + row["data"], row["training"])
            rows.append([f"{precision}, seed {row['seed']}", *numbers, *(f"{time:.1f}" for time in times)])
        median = statistics.median(row["seconds"] for row in of_it)
        rows.append([f"{precision}, median of {len(of_it)}", "", "", f"**{median:.1f}**", "", ""])
    threads = result["rows"][0]["threads"]
    below = f"`{result['command']}`: {result['what']}; {threads} threads, {result['machine']}."
    if gap is not None:
        below += f"\nbf16 changes the objective by {gap['mean']:+.3f} ± {gap['stderr']:.3f} nats."
    heads = ("", "reconstruction", "KL", "seconds", "of them imports and data", "training")
    return table(heads, rows, below)


def bf16_table() -> str:
    """What bf16 changes of each recipe's test objective, where that was measured."""
    rows: list[list[str]] = []
    commands: list[str] = []
    for name, entry in RECIPES.items():
        result = _found(f"time-{name}")
        if result is None or result["gap"] is None:
            continue
        gap, taken = result["gap"], entry.make().bf16_gap is not None
        rows.append([f"`{name}`", f"{gap['mean']:+.3f} ± {gap['stderr']:.3f}", str(gap["seeds"]),
                     "bf16 where it is fast" if taken else "fp32"])  # fmt: skip
        commands.append(f"`{result['command']}`")
    heads = ("recipe", "bf16 − fp32, nats", "seeds", "`--precision auto`")
    return table(heads, rows, ", ".join(commands) + ": test images, 1 posterior sample, paired by seed.")


def explorer_table() -> str:
    """How fast the explorer answers."""
    result = _read("explorer")
    (many,) = {key for row in result["rows"] for key in row if key.endswith("_clients")}
    rows: list[list[str]] = []
    for row in result["rows"]:
        pointer, clients = row["pointer_to_picture"], row[many]
        times = (pointer["median"], pointer["p95"], clients["median"], clients["p95"], clients["largest"])
        rows.append([f"`{row['run']}`", *(f"{time} ms" for time in times)])
    heads = ("run", "pointer to picture: median", "p95", f"{many.partition('_')[0]} clients at once: median", "p95",
             "largest")  # fmt: skip
    return table(heads, rows, f"`{result['command']}`: {result['what']}, {result['machine']}.")


def ceilings_table() -> str:
    """The machine's own limits, of the same run."""
    result = _read("training")
    of_key = {key: [repeat["ceilings"][key] for repeat in result["repeats"]]
              for key in result["repeats"][0]["ceilings"]}  # fmt: skip
    rows = [[key, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
            for key, values in of_key.items()]  # fmt: skip
    return table(("", "median", "range"), rows, f"{_measured_by(result)}.")


def streaming_table() -> str:
    """Training from disk against training from memory."""
    result = _read("streaming")
    ratio, steps = result["ratio"], result["ms_per_step"]
    range_ = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
    speeds = f"{steps['disk']:.0f} against {steps['memory']:.0f} ms a step"
    where = f"{result['threads']} threads, {result['machine']}"
    return (f"From disk at {ratio['median']:.2f} ({range_}) of the speed from memory: {speeds}. "
            f"`{result['command']}`: {result['what']}; {where}.")  # fmt: skip


def scaling_table() -> str:
    """How the cost of an image grows with one thing at a time."""
    result = _read("scaling")
    rows = [[what, ", ".join(f"{value}: {cost:.1f}" for value, cost in row.items())]
            for what, row in result["rows"].items()]  # fmt: skip
    return table(("", "microseconds an image"), rows, f"{_measured_by(result)}.")


def _measured_by(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = f"{result['machine']}, {result['threads']} threads"
    return f"`{result['command']}`: {machine}, commit {result['commit']}, {versions}"


def metrics_table(protocol: str | None, columns: dict[str, str], unit: str, count: str | None = None) -> str:
    """Some metrics of every recipe's run on MNIST's test images; protocol None: the one it was trained under.

    ``count`` names the metric whose number of images is shown, where not all have the same.
    """
    rows: list[list[str]] = []
    for name, result in _on_mnist(RECIPES):
        metrics = _own(result) if protocol is None else result["test"].get(protocol, {}).get("metrics", {})
        if any(key in metrics for key in columns):
            sampled = [f"{metrics[count]['n']:,}" if count in metrics else "–"] if count else []
            rows.append([f"`{name}`", *(_cell(metrics.get(key)) for key in columns), *sampled])
    return table([f"recipe ({unit})", *columns.values(), *(["images sampled"] if count else [])], rows)


def published_table() -> str:
    """Recipes whose published number is a likelihood, beside ours."""
    rows: list[list[str]] = []
    for name, result in _on_mnist((*RECIPES, *VARIANTS)):
        published = RECIPES[VARIANTS.get(name, name)].published
        if not (found := [key for key in published if key.startswith("nll_")]):
            continue
        metrics, (key,) = _own(result), found
        cpu = "–" if result["cpu_seconds"] is None else f"{result['cpu_seconds'] / 60:.0f}"
        units = f"{published['active_units']:g}" if "active_units" in published else "–"
        rows.append([
            f"`{name}`", key.removeprefix("nll_"), f"{published[key]:.2f}", _cell(metrics.get(key)), units,
            _cell(metrics.get("active_units")), f"{result['epochs']}", f"{result['seconds'] / 60:.0f}", cpu,
        ])  # fmt: skip
    heads = ("recipe", "IWAE k", "published", "measured", "active units: published", "measured", "epochs", "minutes",
             "of processor time")  # fmt: skip
    return table(heads, rows)


def curve_table(*names: str) -> str:
    """How the validation loss of some runs fell, by processor time."""
    heads = [head for name in names for head in (f"`{name}`: epoch", "minutes", "loss")]
    curves = [_read(f"mnist/{name}")["curve"] for name in names]
    rows = [[cell for p in points
             for cell in (str(p["epoch"]), f"{p['cpu_minutes']:.0f}", f"{p['validation_loss']:.2f}")]
            for points in zip(*curves, strict=True)]  # fmt: skip
    return table(heads, rows)


def doctor_table() -> str:
    """What was provoked against what was said: counts over seeds and both data sets."""
    result = _read("doctor")
    cases: dict[str, list[dict[str, Any]]] = {}
    for key, row in result["rows"].items():
        cases.setdefault(key.split(" / ")[1], []).append(row)
    said = sorted({name for rows in cases.values() for row in rows for name in row["found"]})
    lines: list[list[str]] = []
    for case, rows in cases.items():
        expected = rows[0]["expected"]
        right = sum(expected in row["found"] if expected else "illness" not in row["found"].values() for row in rows)
        counts = (sum(name in row["found"] for row in rows) for name in said)
        cells = (f"**{n}**" if name == expected else str(n or "") for name, n in zip(said, counts, strict=True))
        lines.append([case, str(len(rows)), str(right), *cells])
    healthy = [row for rows in cases.values() for row in rows if not row["expected"]]
    false = sum("illness" in row["found"].values() for row in healthy)
    seeds = sorted({int(key.rpartition(" / ")[2]) for key in result["rows"]})
    below = (f"False alarms: {false} of {len(healthy)} healthy runs. `{result['command']}`: seeds "
             f"{', '.join(map(str, seeds))}, {result['what']}, {result['machine']}.")  # fmt: skip
    return table(("provoked", "runs", "named", *said), lines, below)


def verdicts_table() -> str:
    """What the doctor says of each recipe's run on MNIST."""
    rows: list[list[str]] = []
    for name, result in _on_mnist(RECIPES):
        for finding in result["doctor"]:
            what = f"{finding['name']} ({finding['kind']})"
            rows.append([f"`{name}`", what, finding["evidence"], finding["remedy"]])
        if not result["doctor"]:
            rows.append([f"`{name}`", "healthy", "", ""])
    return table(("recipe", "finding", "evidence", "next"), rows)


def nll_throughput_table() -> str:
    """Importance sampling against pythae."""
    result = _read("nll_throughput")
    ratios, median = [pair["ratio"] for pair in result["pairs"]], result["median"]
    alone = median["products_alone"]
    rows = [
        ["vaelab", f"{median['vaelab']:.1f}", f"{median['ratio']:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"],
        [f"pythae {result['versions']['pythae']}", f"{median['pythae']:.1f}", "1"],
        ["the decoder's products alone", f"{alone:.1f}", f"{alone / median['pythae']:.1f}"],
    ]
    below = [f"`{result['command']}`: {result['what']}; medians of {len(ratios)} interleaved pairs; "
             f"{result['threads']} threads, {result['machine']}, torch {result['versions']['torch']} on both "
             "sides."]  # fmt: skip
    if (ais := _found("ais_throughput")) is not None:
        heads = ("batched", "batched, one thread", "four images, one thread")
        batched, single, few = (ais["median"][head] for head in heads)
        below.append(f"Annealing: {batched:.2f} images a second in large batches on {ais['threads']} threads, "
                     f"{single:.2f} on one, {few:.2f} with the chains of four images at a time on one "
                     f"(`{ais['command']}`: {ais['what']}; {ais['machine']}).")  # fmt: skip
    if (gap := _found("nll_bf16_gap")) is not None:
        below.append(f"bf16 products instead of fp32 change the NLL by {gap['nats']:+.4f} ± {gap['stderr']:.4f} nats "
                     f"({gap['images']} images, paired; `{gap['command']}`).")  # fmt: skip
    return table(("", "images/s", "ratio"), rows, *below)


def vq_table() -> str:
    """A codebook's use, and its reconstructions beside those of a continuous latent."""
    keys = {"perplexity": "perplexity", "codes_used": "codes used", "mse": "MSE of a pixel", "psnr": "PSNR (dB)",
            "rate": "rate (nats)"}  # fmt: skip
    rows: list[list[str]] = []
    for name, result in _on_mnist(("vq", "conv-beta")):
        metrics = _own(result)
        cells = [f"{metrics['mse']['value']:.5f}" if key == "mse" and "mse" in metrics else _cell(metrics.get(key))
                 for key in keys]  # fmt: skip
        cpu = result["cpu_seconds"]
        rows.append([f"`{name}`", *cells, str(result["epochs"]), "–" if cpu is None else f"{cpu / 60:.0f}"])
    return table(("recipe", *keys.values(), "epochs", "minutes of processor time"), rows)


def holes_table() -> str:
    """An autoencoder beside the VAE on its networks, and with a prior that was fitted to its codes."""
    about = {
        "mlp-2d": "`mlp-2d`, standard normal prior",
        "ae-2d": "`ae-2d`, sampled from a standard normal",
        "ae-2d-mixture": "`ae-2d`, sampled from a mixture fitted to its codes",
        "rae": "`rae` (16 latents), sampled from a standard normal",
        "rae-mixture": "`rae`, sampled from a mixture fitted to its codes",
    }
    columns = {key: PICTURES[key] for key in ("psnr", "frechet", "frechet_floor", "precision", "recall")}
    found = dict(_on_mnist(about))
    rows = [[about[name], *(_cell(_own(result).get(key)) for key in columns)] for name, result in found.items()]
    below: list[str] = []
    for name in ("ae-2d", "rae"):
        if f"{name}-mixture" in found:
            refit = found[f"{name}-mixture"]["refit"]
            before, after = (_number(refit[when]) for when in ("before", "after"))
            below.append(f"log p(z) of a code of each validation image of `{name}`: {before} nats under the standard "
                         f"normal, {after} under the mixture (`{refit['command']}`).")  # fmt: skip
    return table(("", *columns.values()), rows, *below)


def factors_table() -> str:
    """Objectives that weigh the dependence of codes, on known factors: means and standard errors over seeds."""
    result = _read("factors")
    columns = {
        "distortion": "distortion", "rate": "rate", "total_correlation": "TC", "mutual_information_gap": "MIG",
        "disentanglement": "disentanglement", "completeness": "completeness",
    }  # fmt: skip
    digits = {key: 2 if key in ("distortion", "rate") else 3 for key in columns}
    rows = [[name, *(" ± ".join(f"{number:.{digits[key]}f}" for number in found[key]) for key in columns)]
            for name, found in result["summary"].items()]  # fmt: skip
    below = f"`{result['command']}`: {result['what']}; {result['machine']}, torch {result['torch']}."
    return table(("objective", *columns.values()), rows, below)


def tuning_table() -> str:
    """A grid of latent sizes."""
    result = _read("tune-latent-mnist")
    rows: list[list[str]] = []
    for s in result["settings"]:
        above = f"{s['above']:.2f} ± {s['above_stderr']:.2f}"
        terms = (f"{s[key]:.2f}" for key in ("negative_elbo", "distortion", "rate"))
        rows.append([str(s["latent_dim"]), f"{s['nll']:.2f} ± {s['stderr']:.2f}", above, *terms,
                     f"{s['active_units']:.0f}"])  # fmt: skip
    dims = " ".join(str(s["latent_dim"]) for s in result["settings"])
    heads = ("latent size", "−log p(x)", "above the least (paired)", "−ELBO", "distortion", "rate", "active units")
    below = (f"`vaelab tune-latent mnist --latent-dims {dims} --epochs {result['run']['training']['epochs']}`: "
             f"{result['recipe']}, {result['protocol']}, one seed.")  # fmt: skip
    return table(heads, rows, below)


BOUNDS = {
    "negative_elbo": "−ELBO", "nll_1": "k = 1", "nll_10": "10", "nll_100": "100", "nll_500": "500",
    "nll_1000": "1000",
    "nll_5000": "5000", "ess": "ESS",
}  # fmt: skip
ANNEALED = {"nll_ais": "−log p(x), AIS", "ais_gain": "tighter than IWAE by", "bdmc_gap": "BDMC gap (simulated)"}
CODES = {
    "active_units": "active units", "mutual_information": "I(x; z)", "aggregate_kl": "KL(q(z) ‖ p(z))",
    "two_sample_accuracy": "telling q(z) from p(z)", "linear_probe": "linear probe", "knn_probe": "5-NN",
}  # fmt: skip
PICTURES = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "frechet": "Fréchet distance", "frechet_floor": "floor",
    "precision": "precision", "recall": "recall",
}  # fmt: skip

TABLES: dict[str, Callable[[], str]] = {
    "likelihoods": partial(metrics_table, "dynamic", BOUNDS, "nats", "nll_1"),
    "annealed": partial(metrics_table, "dynamic", ANNEALED, "nats", "nll_ais"),
    "codes": partial(metrics_table, None, CODES, "trained protocol"),
    "pictures": partial(metrics_table, None, PICTURES, "trained protocol"),
    "published": published_table,
    "curves": partial(curve_table, "burda-iwae", "burda-dreg", "vamp"),
    "factors": factors_table,
    "holes": holes_table,
    "vq": vq_table,
    "doctor": doctor_table,
    "tuning": tuning_table,
    "verdicts": verdicts_table,
    "nll-throughput": nll_throughput_table,
    "recipes": recipes_table,
    "commands": commands_table,
    "improving": partial(sweep_table, "improving"),
    "beta": partial(sweep_table, "beta"),
    "augmentation": partial(sweep_table, "augmentation"),
    "speed-mlp": partial(speed_table, "mlp"),
    "speed-conv": partial(speed_table, "conv"),
    "speed-mlp-without-amx": partial(speed_table, "mlp", "training-without-amx"),
    "speed-conv-without-amx": partial(speed_table, "conv", "training-without-amx"),
    "ceilings": ceilings_table,
    "time-fast": partial(time_table, "fast"),
    "scaling": scaling_table,
    "streaming": streaming_table,
    "bf16": bf16_table,
    "explorer": explorer_table,
    "aevb-bounds": aevb.bounds_table,
    "aevb-frey": aevb.frey_table,
    "aevb-likelihood": aevb.likelihood_table,
    **{f"parts-{slot}": partial(parts_table, slot) for slot in SLOTS},
}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *below: str) -> str:
    """A table in Markdown, and paragraphs below it."""
    head, *lines = ("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in (heads, *rows))
    return "\n".join([head, "|---" * len(heads) + "|", *lines, *(f"\n{paragraph}" for paragraph in below)])


def _own(result: dict[str, Any]) -> dict[str, Any]:
    """The metrics under the protocol that the run was trained with."""
    return result["test"][result["data"]["protocol"]]["metrics"]


def _cell(estimate: dict[str, Any] | None) -> str:
    return "–" if estimate is None else _number(estimate)


def _number(estimate: dict[str, Any]) -> str:
    places = 3 if abs(estimate["value"]) <= 1 else 2
    return f"{estimate['value']:.{places}f} ± {estimate['stderr']:.{places}f}"


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _found(name: str) -> dict[str, Any] | None:
    return _read(name) if (RESULTS / f"{name}.json").exists() else None


def _on_mnist(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What these recipes have measured on MNIST, of those that have."""
    for name in names:
        if (result := _found(f"mnist/{name}")) is not None:
            yield name, result


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) > 2:
        for argument in sys.argv[2:]:
            path, _, name = argument.partition("=")
            collect(Path(path), name)
    elif sys.argv[1:] == ["render"]:
        render()
    else:
        sys.exit(__doc__)
