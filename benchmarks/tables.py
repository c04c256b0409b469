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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import SLOTS, parts_table
from training import SIDES, seconds
from vaelab.checkpoint import write_json
from vaelab.config import Run, flat
from vaelab.diagnose import diagnose, examine
from vaelab.errors import FailureError
from vaelab.folder import RunFolder
from vaelab.loading import load_data, load_model
from vaelab.recipes import RECIPES, recipe
from vaelab.recipes.systems import RECIPES as SYSTEMS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/improving.md", "docs/theory.md", "docs/doctor.md",
         "docs/performance.md", "docs/parts.md")  # fmt: skip

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
    findings = diagnose(examine(run, load_model(path), load_data(run), folder.history(), folder.failure()))
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
    """The command line that gives this run."""
    default = flat(recipe(run.recipe))
    words = [f"vaelab train {run.recipe}"]
    for name, leaf in flat(run).items():
        if leaf.value != default[name].value:
            values = leaf.value if isinstance(leaf.value, tuple) else (leaf.value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def render() -> None:
    """Write all tables into their pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def recipes_table() -> str:
    """The five systems and ``fast``, on MNIST's test set."""
    rows = ["| recipe | reconstruction | KL | −ELBO | published | epochs | time |", "|---|---|---|---|---|---|---|"]
    for name, entry in SYSTEMS.items():
        result = _load(f"mnist/{name}")
        if result is None:
            continue
        metrics = _own(result)
        published = "–"
        if "distortion" in entry.published:
            published = f"reconstruction {entry.published['distortion']:.2f}, KL {entry.published['rate']:.2f}"
        if "objective" in entry.published:
            ours = metrics["objective"]["value"]
            published += f", weighted sum {entry.published['objective']:.2f} (ours: {ours:.2f})"
        cells = [_cell(metrics.get(key)) for key in ("distortion", "rate", "negative_elbo")]
        threads = result["resolved"]["threads"]
        minutes = result["median_epoch_seconds"] * result["epochs"] / 60
        length = f"{minutes:.0f} min" if minutes >= 1 else f"{minutes * 60:.0f} s"
        time = f"{length} on {threads} core{'s' if threads > 1 else ''}"
        rows.append(f"| `{name}` | {' | '.join(cells)} | {published} | {result['epochs']} | {time} |")
    return "\n".join(rows)


def commands_table() -> str:
    """How each recipe's numbers were made."""
    rows = ["| recipe | command | best epoch | images/s | parameters | machine |", "|---|---|---|---|---|---|"]
    for name in (*RECIPES, *VARIANTS):
        result = _load(f"mnist/{name}")
        if result is not None:
            resolved = result["resolved"]
            where = f"{resolved['machine']}, torch {resolved['torch']}, {resolved['precision']}"
            rows.append(
                f"| `{name}` | `{result['command']}` | {result['best_epoch']} of {result['epochs']} | "
                f"{result['images_per_second']:,.0f} | {resolved['parameters']:,} | {where} |"
            )
    return "\n".join(rows)


def sweep_table(name: str) -> Callable[[], str]:
    """A sweep's rows, in nats per validation image."""

    def table() -> str:
        result = _load(f"sweep-{name}")
        if result is None:
            return "(not measured yet)"
        rows = ["| | reconstruction | KL | −ELBO | epochs | seconds |", "|---|---|---|---|---|---|"]
        for label, row in result["rows"].items():
            numbers = (f"{row[key][0]:.2f} ± {row[key][1]:.2f}" for key in ("distortion", "rate", "negative_elbo"))
            rows.append(f"| {label} | {' | '.join(numbers)} | {row['epochs']} | {row['seconds']} |")
        threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
        rows.append(
            f"\n`{result['command']}`: {result['protocol']}; seed {result['seed']}; {threads}, {result['machine']}."
        )
        return "\n".join(rows)

    return table


def speed_table(work: str) -> Callable[[], str]:
    """Training speed of every side that does this work (``mlp`` or ``conv``), against the first of them."""

    def table() -> str:
        result = _load("training")
        if result is None:
            return "(not measured yet)"
        chosen = [name for name, side in SIDES.items() if side.work == work and name in result["repeats"][0]]
        rivals = [name for name in chosen if SIDES[name].peer] or chosen[:1]
        against = [f"{SIDES[name].what.partition(',')[0]} ÷ this" for name in rivals]
        score = [] if work == "conv" else ["test −ELBO"]
        start = "first epoch (s)" if score else "first 5 steps (s)"
        heads = ["", "seconds an epoch", *against, *score, start, "memory (MiB)"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name in chosen:
            rows = [repeat[name] for repeat in result["repeats"]]
            cells = [f"{statistics.median(map(seconds, rows)):.3f}"]
            for rival in rivals:
                ratios = [seconds(repeat[rival]) / seconds(repeat[name]) for repeat in result["repeats"]]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            if score:
                bounds = [row["distortion"] + row["rate"] for row in rows]
                spread = statistics.stdev(bounds) / len(bounds) ** 0.5 if len(bounds) > 1 else float("nan")
                cells.append(f"{statistics.mean(bounds):.2f} ± {spread:.2f}")
            cells.append(f"{statistics.median(row['seconds'][0] for row in rows):.1f}")
            cells.append(f"{statistics.median(row['memory'] for row in rows):.0f}")
            lines.append(f"| {SIDES[name].what} | {' | '.join(cells)} |")
        lines.append(f"\n{_measured_by(result)}; medians of {len(result['repeats'])} interleaved repeats (range).")
        return "\n".join(lines)

    return table


def time_table(name: str) -> Callable[[], str]:
    """Seconds from the start of a process to a recipe's test result."""

    def table() -> str:
        result = _load(f"time-{name}")
        if result is None:
            return "(not measured yet)"
        published = result["published"]
        lines = [
            "| | reconstruction | KL | seconds | of them imports and data | training |",
            "|---|---|---|---|---|---|",
        ]
        lines.append(f"| published | {published['distortion']:.2f} | {published['rate']:.2f} | | | |")
        for precision in dict.fromkeys(row["precision"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["precision"] == precision]
            for row in rows:
                numbers = (f"{row[key]:.2f}" for key in ("distortion", "rate"))
                times = (row["seconds"], row["imports"] + row["data"], row["training"])
                cells = [*numbers, *(f"{time:.1f}" for time in times)]
                lines.append(f"| {precision}, seed {row['seed']} | {' | '.join(cells)} |")
            median = statistics.median(row["seconds"] for row in rows)
            lines.append(f"| {precision}, median of {len(rows)} | | | **{median:.1f}** | | |")
        threads = result["rows"][0]["threads"]
        lines.append(f"\n`{result['command']}`: {result['what']}; {threads} threads, {result['machine']}.")
        found = result["gap"]
        if found is not None:
            lines.append(f"bf16 changes the objective by {found['mean']:+.3f} ± {found['stderr']:.3f} nats.")
        return "\n".join(lines)

    return table


def bf16_table() -> str:
    """What bf16 changes of each recipe's test objective, where that was measured."""
    lines = ["| recipe | bf16 − fp32, nats | seeds | `--precision auto` |", "|---|---|---|---|"]
    commands: list[str] = []
    for name, entry in RECIPES.items():
        result = _load(f"time-{name}")
        if result is None or result["gap"] is None:
            continue
        gap, taken = result["gap"], entry.make().bf16_gap is not None
        lines.append(f"| `{name}` | {gap['mean']:+.3f} ± {gap['stderr']:.3f} | {gap['seeds']} | "
                     f"{'bf16 where it is fast' if taken else 'fp32'} |")  # fmt: skip
        commands.append(f"`{result['command']}`")
    return "\n".join([*lines, "\n" + ", ".join(commands) + ": test images, 1 posterior sample, paired by seed."])


def explorer_table() -> str:
    """How fast the explorer answers."""
    result = _load("explorer")
    if result is None:
        return "(not measured yet)"
    (many,) = {key for row in result["rows"] for key in row if key.endswith("_clients")}
    count = many.partition("_")[0]
    lines = [f"| run | pointer to picture: median | p95 | {count} clients at once: median | p95 | largest |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["rows"]:
        pointer, clients = row["pointer_to_picture"], row[many]
        lines.append(f"| `{row['run']}` | {pointer['median']} ms | {pointer['p95']} ms | {clients['median']} ms | "
                     f"{clients['p95']} ms | {clients['largest']} ms |")  # fmt: skip
    return "\n".join([*lines, f"\n`{result['command']}`: {result['what']}, {result['machine']}."])


def ceilings_table() -> str:
    """The machine's own limits, of the same run."""
    result = _load("training")
    if result is None or "ceilings" not in result["repeats"][0]:
        return "(not measured yet)"
    rows = [repeat["ceilings"] for repeat in result["repeats"]]
    lines = ["| | median | range |", "|---|---|---|"]
    for key in rows[0]:
        values = [row[key] for row in rows]
        lines.append(f"| {key} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |")
    return "\n".join([*lines, f"\n{_measured_by(result)}."])


def streaming_table() -> str:
    """Training from disk against training from memory."""
    result = _load("streaming")
    if result is None:
        return "(not measured yet)"
    ratio, steps = result["ratio"], result["ms_per_step"]
    range_ = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
    speeds = f"{steps['disk']:.0f} against {steps['memory']:.0f} ms a step"
    where = f"{result['threads']} threads, {result['machine']}"
    return (f"From disk at {ratio['median']:.2f} ({range_}) of the speed from memory: {speeds}. "
            f"`{result['command']}`: {result['what']}; {where}.")  # fmt: skip


def scaling_table() -> str:
    """How the cost of an image grows with one thing at a time."""
    result = _load("scaling")
    if result is None:
        return "(not measured yet)"
    lines = ["| | microseconds an image |", "|---|---|"]
    for what, row in result["rows"].items():
        lines.append(f"| {what} | {', '.join(f'{value}: {cost:.1f}' for value, cost in row.items())} |")
    return "\n".join([*lines, f"\n{_measured_by(result)}."])


def _measured_by(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = f"{result['machine']}, {result['threads']} threads"
    return f"`{result['command']}`: {machine}, commit {result['commit']}, {versions}"


def metrics_table(
    protocol: str | None, columns: dict[str, str], unit: str, count: str | None = None
) -> Callable[[], str]:
    """Some metrics of every recipe's run on MNIST's test images; protocol None: the one it was trained under.

    ``count`` names the metric whose number of images is shown, where not all have the same.
    """

    def table() -> str:
        heads = [*columns.values(), *(["images sampled"] if count else [])]
        rows = [f"| recipe ({unit}) | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for name in RECIPES:
            result = _load(f"mnist/{name}")
            if result is None:
                continue
            metrics = _own(result) if protocol is None else result["test"].get(protocol, {}).get("metrics", {})
            if any(key in metrics for key in columns):
                cells = [_cell(metrics.get(key)) for key in columns]
                cells += [f"{metrics[count]['n']:,}" if count in metrics else "–"] if count else []
                rows.append(f"| `{name}` | {' | '.join(cells)} |")
        return "\n".join(rows)

    return table


def published_table() -> str:
    """Recipes whose published number is a likelihood, beside ours."""
    heads = ("recipe", "IWAE k", "published", "measured", "active units: published", "measured", "epochs", "minutes",
             "of processor time")  # fmt: skip
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, entry in [*RECIPES.items(), *((name, RECIPES[of]) for name, of in VARIANTS.items())]:
        found = [key for key in entry.published if key.startswith("nll_")]
        result = _load(f"mnist/{name}")
        if not found or result is None:
            continue
        metrics, (key,) = _own(result), found
        cpu = "–" if result["cpu_seconds"] is None else f"{result['cpu_seconds'] / 60:.0f}"
        units = f"{entry.published['active_units']:g}" if "active_units" in entry.published else "–"
        cells = (
            f"`{name}`", key.removeprefix("nll_"), f"{entry.published[key]:.2f}", _cell(metrics.get(key)), units,
            _cell(metrics.get("active_units")), f"{result['epochs']}", f"{result['seconds'] / 60:.0f}", cpu,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def curve_table(*names: str) -> Callable[[], str]:
    """How the validation loss of some runs fell, by processor time."""

    def table() -> str:
        heads = " | ".join(f"`{name}`: epoch | minutes | loss" for name in names)
        rows = [f"| {heads} |", "|---" * (3 * len(names)) + "|"]
        curves = [(_load(f"mnist/{name}") or {}).get("curve", []) for name in names]
        for points in zip(*curves, strict=True):
            cells = [f"{p['epoch']} | {p['cpu_minutes']:.0f} | {p['validation_loss']:.2f}" for p in points]
            rows.append(f"| {' | '.join(cells)} |")
        return "\n".join(rows)

    return table


def doctor_table() -> str:
    """What was provoked against what was said: counts over seeds and both data sets."""
    result = _load("doctor")
    if result is None:
        return "(not measured yet)"
    cases: dict[str, list[dict[str, Any]]] = {}
    for key, row in result["rows"].items():
        cases.setdefault(key.split(" / ")[1], []).append(row)
    said = sorted({name for rows in cases.values() for row in rows for name in row["found"]})
    lines = [f"| provoked | runs | named | {' | '.join(said)} |", "|---" * (3 + len(said)) + "|"]
    for case, rows in cases.items():
        expected = rows[0]["expected"]
        right = sum(expected in row["found"] if expected else "illness" not in row["found"].values() for row in rows)
        counts = (sum(name in row["found"] for row in rows) for name in said)
        cells = (f"**{n}**" if name == expected else str(n or "") for name, n in zip(said, counts, strict=True))
        lines.append(f"| {case} | {len(rows)} | {right} | {' | '.join(cells)} |")
    healthy = [row for rows in cases.values() for row in rows if not row["expected"]]
    false = sum("illness" in row["found"].values() for row in healthy)
    seeds = sorted({int(key.rpartition(" / ")[2]) for key in result["rows"]})
    lines.append(f"\nFalse alarms: {false} of {len(healthy)} healthy runs. `{result['command']}`: seeds "
                 f"{', '.join(map(str, seeds))}, {result['what']}, {result['machine']}.")  # fmt: skip
    return "\n".join(lines)


def verdicts_table() -> str:
    """What the doctor says of each recipe's run on MNIST."""
    rows = ["| recipe | finding | evidence | next |", "|---|---|---|---|"]
    for name in RECIPES:
        result = _load(f"mnist/{name}")
        if result is None:
            continue
        for finding in result["doctor"]:
            rows.append(f"| `{name}` | {finding['name']} ({finding['kind']}) | {finding['evidence']} | "
                        f"{finding['remedy']} |")  # fmt: skip
        if not result["doctor"]:
            rows.append(f"| `{name}` | healthy | | |")
    return "\n".join(rows)


def nll_throughput_table() -> str:
    """Importance sampling against pythae."""
    result = _load("nll_throughput")
    if result is None:
        return "(not measured yet)"
    ratios, median = [pair["ratio"] for pair in result["pairs"]], result["median"]
    lines = [
        "| | images/s | ratio |",
        "|---|---|---|",
        f"| vaelab | {median['vaelab']:.1f} | {median['ratio']:.1f} ({min(ratios):.1f} to {max(ratios):.1f}) |",
        f"| pythae {result['versions']['pythae']} | {median['pythae']:.1f} | 1 |",
        f"| the decoder's products alone | {median['products_alone']:.1f} | "
        f"{median['products_alone'] / median['pythae']:.1f} |",
        f"\n`{result['command']}`: {result['what']}; medians of {len(ratios)} interleaved pairs; {result['threads']} "
        f"threads, {result['machine']}, torch {result['versions']['torch']} on both sides.",
    ]
    ais = _load("ais_throughput")
    if ais is not None:
        heads = ("batched", "batched, one thread", "four images, one thread")
        batched, single, few = (ais["median"][head] for head in heads)
        lines.append(f"\nAnnealing: {batched:.2f} images a second in large batches on {ais['threads']} threads, "
                     f"{single:.2f} on one, {few:.2f} with the chains of four images at a time on one "
                     f"(`{ais['command']}`: {ais['what']}; {ais['machine']}).")  # fmt: skip
    gap = _load("nll_bf16_gap")
    if gap is not None:
        lines.append(f"\nbf16 products instead of fp32 change the NLL by {gap['nats']:+.4f} ± {gap['stderr']:.4f} nats "
                     f"({gap['images']} images, paired; `{gap['command']}`).")  # fmt: skip
    return "\n".join(lines)


def vq_table() -> str:
    """A codebook's use, and its reconstructions beside those of a continuous latent."""
    found = {name: _load(f"mnist/{name}") for name in ("vq", "conv-beta")}
    keys = {"perplexity": "perplexity", "codes_used": "codes used", "mse": "MSE of a pixel", "psnr": "PSNR (dB)",
            "rate": "rate (nats)"}  # fmt: skip
    rows = [f"| recipe | {' | '.join(keys.values())} | epochs | minutes of processor time |",
            "|---" * (3 + len(keys)) + "|"]  # fmt: skip
    for name, result in found.items():
        if result is not None:
            metrics = _own(result)
            cells = [f"{metrics['mse']['value']:.5f}" if key == "mse" and "mse" in metrics else _cell(metrics.get(key))
                     for key in keys]  # fmt: skip
            cpu = result["cpu_seconds"]
            minutes = "–" if cpu is None else f"{cpu / 60:.0f}"
            rows.append(f"| `{name}` | {' | '.join(cells)} | {result['epochs']} | {minutes} |")
    return "\n".join(rows)


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
    rows = [f"| | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    found = {name: result for name in about if (result := _load(f"mnist/{name}")) is not None}
    for name, result in found.items():
        rows.append(f"| {about[name]} | {' | '.join(_cell(_own(result).get(key)) for key in columns)} |")
    for name in ("ae-2d", "rae"):
        if f"{name}-mixture" in found:
            refit = found[f"{name}-mixture"]["refit"]
            before, after = (_number(refit[when]) for when in ("before", "after"))
            rows.append(f"\nlog p(z) of a code of each validation image of `{name}`: {before} nats under the standard "
                        f"normal, {after} under the mixture (`{refit['command']}`).")  # fmt: skip
    return "\n".join(rows)


def factors_table() -> str:
    """Objectives that weigh the dependence of codes, on known factors: means and standard errors over seeds."""
    result = _load("factors")
    if result is None:
        return "(not measured yet)"
    columns = {
        "distortion": "distortion", "rate": "rate", "total_correlation": "TC", "mutual_information_gap": "MIG",
        "disentanglement": "disentanglement", "completeness": "completeness",
    }  # fmt: skip
    rows = [f"| objective | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for name, found in result["summary"].items():
        digits = {key: 2 if key in ("distortion", "rate") else 3 for key in columns}
        cells = [" ± ".join(f"{number:.{digits[key]}f}" for number in found[key]) for key in columns]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows.append(f"\n`{result['command']}`: {result['what']}; {result['machine']}, torch {result['torch']}.")
    return "\n".join(rows)


def tuning_table() -> str:
    """A grid of latent sizes."""
    result = _load("tune-latent-mnist")
    if result is None:
        return "(not measured yet)"
    rows = ["| latent size | −log p(x) | above the least (paired) | −ELBO | distortion | rate | active units |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for s in result["settings"]:
        rows.append(
            f"| {s['latent_dim']} | {s['nll']:.2f} ± {s['stderr']:.2f} | {s['above']:.2f} ± {s['above_stderr']:.2f} | "
            f"{s['negative_elbo']:.2f} | {s['distortion']:.2f} | {s['rate']:.2f} | {s['active_units']:.0f} |"
        )
    dims = " ".join(str(s["latent_dim"]) for s in result["settings"])
    rows.append(f"\n`vaelab tune-latent mnist --latent-dims {dims} --epochs {result['run']['training']['epochs']}`: "
                f"{result['recipe']}, {result['protocol']}, one seed.")  # fmt: skip
    return "\n".join(rows)


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
    "likelihoods": metrics_table("dynamic", BOUNDS, "nats", "nll_1"),
    "annealed": metrics_table("dynamic", ANNEALED, "nats", "nll_ais"),
    "codes": metrics_table(None, CODES, "trained protocol"),
    "pictures": metrics_table(None, PICTURES, "trained protocol"),
    "published": published_table,
    "curves": curve_table("burda-iwae", "burda-dreg", "vamp"),
    "factors": factors_table,
    "holes": holes_table,
    "vq": vq_table,
    "doctor": doctor_table,
    "tuning": tuning_table,
    "verdicts": verdicts_table,
    "nll-throughput": nll_throughput_table,
    "recipes": recipes_table,
    "commands": commands_table,
    "improving": sweep_table("improving"),
    "beta": sweep_table("beta"),
    "augmentation": sweep_table("augmentation"),
    "speed-mlp": speed_table("mlp"),
    "speed-conv": speed_table("conv"),
    "ceilings": ceilings_table,
    "time-fast": time_table("fast"),
    "scaling": scaling_table,
    "streaming": streaming_table,
    "bf16": bf16_table,
    "explorer": explorer_table,
    **{f"parts-{slot}": parts_table(slot) for slot in SLOTS},
}


def _own(result: dict[str, Any]) -> dict[str, Any]:
    """The metrics under the protocol that the run was trained with."""
    return result["test"][result["data"]["protocol"]]["metrics"]


def _cell(estimate: dict[str, Any] | None) -> str:
    return "–" if estimate is None else _number(estimate)


def _number(estimate: dict[str, Any]) -> str:
    places = 3 if abs(estimate["value"]) <= 1 else 2
    return f"{estimate['value']:.{places}f} ± {estimate['stderr']:.{places}f}"


def _load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) > 2:
        for argument in sys.argv[2:]:
            path, _, name = argument.partition("=")
            collect(Path(path), name)
    elif sys.argv[1:] == ["render"]:
        render()
    else:
        sys.exit(__doc__)
