"""The experiments of *Auto-Encoding Variational Bayes*: trainings, what they measure, and the figures of it.

    python benchmarks/aevb.py bounds OUT [NAME ...]  trains the runs of figure 2 into OUT, or those of these names, and
                                                     measures them: benchmarks/results/aevb-bounds.json
    python benchmarks/aevb.py likelihood             figure 3: benchmarks/results/aevb-likelihood.json
    python benchmarks/aevb.py draw                   both as pictures: docs/images/aevb-bounds.png, aevb-likelihood.png
    python benchmarks/aevb.py pictures OUT           figures 4 and 5, of OUT: aevb-manifold.png, aevb-samples.png

A run is called ``aevb-elbo-20``: recipe, objective, dimensions. What was trained or measured already is not again; a
run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import vaelab as v
from vaelab import figures
from vaelab.drawing import media
from vaelab.figures.decoding import decode, sample_prior
from vaelab.figures.style import STYLE, show, tile
from vaelab.runs.checkpoint import write_bytes, write_json
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import load_model
from vaelab.runtime import cpu_name
from vaelab.train import Epoch

ROOT = Path(__file__).parent.parent
BOUNDS, LIKELIHOOD = (ROOT / "benchmarks" / "results" / f"aevb-{name}.json" for name in ("bounds", "likelihood"))
IMAGES = ROOT / "docs" / "images"

DIMENSIONS = {"aevb": (3, 5, 10, 20, 200), "aevb-frey": (2, 5, 10, 20)}
RULES = {"elbo": "AEVB", "wake-sleep": "wake-sleep", "mcem": "Monte Carlo EM"}
COLOURS = {"elbo": "#1f5fb4", "wake-sleep": "#c8501e", "mcem": "#2a8c4a"}
# Test numbers of a public rerun (AEVB MNIST Reproduction v3), after 18 million images.
RERUN = {("elbo", 3): 141.30, ("elbo", 5): 124.41, ("elbo", 10): 107.57, ("elbo", 20): 100.61, ("elbo", 200): 99.23,
         ("wake-sleep", 3): 146.83, ("wake-sleep", 5): 127.97, ("wake-sleep", 10): 112.97, ("wake-sleep", 20): 106.35,
         ("wake-sleep", 200): 108.02}  # fmt: skip
# Of figure 3: training images, and the epochs after which the likelihood is measured.
SIZES = {1_000: (10, 50, 100, 250, 500, 1_000, 2_000, 4_000), 50_000: (1, 2, 5, 10, 20, 50, 100, 200)}
SCORED = 1_000  # images of either split, as in the paper


def main(what: str, *arguments: str) -> None:
    """Do one of the four."""
    {"bounds": bounds, "likelihood": likelihood, "draw": draw, "pictures": pictures}[what](*arguments)


# --- figure 2 -------------------------------------------------------------------------------------------------------


def bounds(out: str, *names: str) -> None:
    """Train and measure the runs of figure 2."""
    wanted = {f"{recipe}-{rule}-{size}": (recipe, rule, size)
              for recipe, sizes in DIMENSIONS.items() for size in sizes for rule in ("elbo", "wake-sleep")}  # fmt: skip
    for name in names or wanted:
        if name not in wanted:
            raise SystemExit(f"no run {name!r}: {', '.join(wanted)}")
        if name in _rows(BOUNDS):
            continue
        path, (recipe, rule, size) = Path(out) / name, wanted[name]
        begun = (path / "config.json").exists()
        run = v.override(v.recipes.recipe(recipe), objective=rule, latent_dim=size, precision="bf16", threads=1)
        model = v.fit(run, out=path, resume=begun)
        data, folder = v.load(run.data), RunFolder.open(path)
        torch.set_num_threads(1)
        measured = v.evaluate.evaluate(model, run, data)
        history = folder.history()
        seen = folder.config()["resolved"]["steps_per_epoch"] * run.training.batch_size
        cuts = sorted({round(e) for e in np.geomspace(1, len(history), 40)})
        row = {
            "command": f"vaelab train {recipe} --latent-dim {size} --objective {rule} --precision bf16 --threads 1",
            "test": {key: estimate.to_json() for key, estimate in measured.items()},
            "images_seen": seen * len(history),
            "cpu_minutes": round(sum(record["cpu_seconds"] for record in history) / 60, 1),
            "curve": [
                [seen * e, *(round(history[e - 1][key], 2) for key in ("loss", "validation_loss"))] for e in cuts
            ],
        }
        print(name, measured["negative_elbo"], flush=True)
        _add(BOUNDS, name, row, "curve: images seen, loss while training, loss on the validation images")


# --- figure 3 -------------------------------------------------------------------------------------------------------


def likelihood() -> None:
    """Train the small models of figure 3, and measure their likelihood on the way."""
    torch.set_num_threads(1)
    whole = v.load("mnist", protocol="static", validation_size=10_000)
    for size, epochs in SIZES.items():
        data = dataclasses.replace(whole, train=whole.train.first(size), validation=whole.validation.first(SCORED),
                                   test=whole.test.first(SCORED), asked=None)  # fmt: skip
        for rule in RULES if size == 1_000 else ("elbo", "wake-sleep"):
            name = f"{rule}-{size}"
            if name in _rows(LIKELIHOOD):
                continue
            run = v.override(
                v.recipes.aevb(), objective=rule, latent_dim=3, encoder_hidden_dims=(100,), decoder_hidden_dims=(100,),
                weight_decay=1 / size, epochs=epochs[-1], compile="on", threads=1,
            )  # fmt: skip
            curve: list[dict[str, Any]] = []
            started = time.process_time()

            def measure(epoch: Epoch, epochs: tuple[int, ...] = epochs, curve: list[dict[str, Any]] = curve) -> None:
                if epoch.number in epochs:
                    curve.append(_likelihood_at(epoch))
                    print(epoch.run.objective.word, curve[-1], flush=True)

            v.fit(run, data, on_epoch_end=(measure,))
            row = {"training_images": size, "curve": curve,
                   "cpu_minutes": round((time.process_time() - started) / 60, 1)}  # fmt: skip
            _add(LIKELIHOOD, name, row, "nats per image, standard error over images: -log p(x) by "
                 "evaluate.reciprocal_nll (50 samples, 4 leapfrog steps); at the end by importance sampling of 5,000 "
                 "too, and -ELBO; processor minutes with these measurements")  # fmt: skip


def _likelihood_at(epoch: Epoch) -> dict[str, Any]:
    """What is measured of a model while it trains; where it ends, in other ways too."""
    model, data = epoch.model, epoch.data
    point: dict[str, Any] = {"images_seen": epoch.number * len(data.train)}
    for split in ("train", "test"):
        point[split] = _pair(v.evaluate.reciprocal_nll(model, data, split, rows=SCORED)["nll_reciprocal"])
        if epoch.last:
            found = v.evaluate.nll(model, data, split, num_samples=5_000, rows=SCORED)["nll_5000"]
            point[f"{split}_importance"] = _pair(found)
    if epoch.last:
        point["negative_elbo"] = _pair(v.evaluate.evaluate(model, epoch.run, data)["negative_elbo"])
    return point


def _pair(estimate: v.Estimate) -> list[float]:
    return [round(estimate.value, 3), round(estimate.stderr, 3)]


# --- results --------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def _add(path: Path, name: str, row: dict[str, Any], what: str) -> None:
    """Write a row more."""
    rows = {**_rows(path), name: {**row, "machine": cpu_name(), "torch": torch.__version__}}
    command = "bounds OUT" if path == BOUNDS else "likelihood"
    write_json(path, {"command": f"python benchmarks/aevb.py {command}", "seed": 0, "threads": 1, "what": what,
                      "rows": rows})  # fmt: skip


# --- tables ---------------------------------------------------------------------------------------------------------


def bounds_table() -> str:
    """A row for each number of dimensions of MNIST: both rules, with a rerun's numbers."""
    rows = _rows(BOUNDS)
    lines = [
        "| dimensions | AEVB: distortion | KL | −ELBO | a rerun's | wake-sleep: −ELBO | a rerun's |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in DIMENSIONS["aevb"]:
        ours, other = (rows.get(f"aevb-{rule}-{size}", {"test": {}})["test"] for rule in ("elbo", "wake-sleep"))
        cells = [_cell(ours.get(key)) for key in ("distortion", "rate", "negative_elbo")]
        cells += [f"{RERUN['elbo', size]:.2f}", _cell(other.get("negative_elbo")), f"{RERUN['wake-sleep', size]:.2f}"]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def frey_table() -> str:
    """A row for each number of dimensions of Frey Face."""
    rows = _rows(BOUNDS)
    lines = [
        "| dimensions | AEVB: bound on log p(x) | KL | wake-sleep: bound on log p(x) | KL |",
        "|---|---|---|---|---|",
    ]
    for size in DIMENSIONS["aevb-frey"]:
        cells: list[str] = []
        for rule in ("elbo", "wake-sleep"):
            test = rows.get(f"aevb-frey-{rule}-{size}", {"test": {}})["test"]
            bound = test.get("negative_elbo")
            cells += [_cell(bound and {**bound, "value": -bound["value"]}), _cell(test.get("rate"))]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def likelihood_table() -> str:
    """A row for each model of figure 3, at the end of its training."""
    lines = ["| training images | rule | images seen | −log p(x): training images | test images | test, by importance "
             "sampling | −ELBO, test | processor minutes |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in _rows(LIKELIHOOD).items():
        last = row["curve"][-1]
        pairs = last["train"], last["test"], last["test_importance"], last["negative_elbo"]
        cells = [f"{row['training_images']:,}", RULES[name.rsplit("-", 1)[0]], f"{last['images_seen']:,}",
                 *(f"{value:.2f} ± {stderr:.2f}" for value, stderr in pairs), str(row["cpu_minutes"])]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(estimate: dict[str, Any] | None) -> str:
    return "–" if estimate is None else f"{estimate['value']:.2f} ± {estimate['stderr']:.2f}"


# --- pictures -------------------------------------------------------------------------------------------------------


def draw() -> None:
    """Draw both figures from their results."""
    with mpl.rc_context(STYLE):
        write_bytes(IMAGES / "aevb-bounds.png", media.png(bounds_figure(_rows(BOUNDS)), dpi=90))
        write_bytes(IMAGES / "aevb-likelihood.png", media.png(likelihood_figure(_rows(LIKELIHOOD)), dpi=90))


def pictures(out: str) -> None:
    """Draw what the trained models make: the plane of Frey Face's two dimensions, and samples of MNIST's."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        plane = figures.manifold(load_model(Path(out) / "aevb-frey-elbo-2"), 12, title="Frey Face, 2 dimensions")
        write_bytes(IMAGES / "aevb-manifold.png", media.png(plane, dpi=90))
        figure = Figure(figsize=(13, 3.5), layout="constrained")
        sizes = DIMENSIONS["aevb"][:4]
        for axes, size in zip(figure.subplots(1, len(sizes)), sizes, strict=True):
            model = load_model(Path(out) / f"aevb-elbo-{size}")
            show(axes, tile(decode(model, sample_prior(model, 64, seed=0)), 8))
            axes.set_title(f"{size} dimensions")
            axes.set_axis_off()
        write_bytes(IMAGES / "aevb-samples.png", media.png(figure, dpi=90))


def bounds_figure(rows: dict[str, Any]) -> Figure:
    """The bound over images seen: a panel for each number of dimensions, MNIST above, Frey Face below."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    panels = figure.subplots(2, 5, sharex="row", sharey="row", squeeze=False)
    for line, (recipe, sizes) in zip(panels, DIMENSIONS.items(), strict=True):
        for axes, size in zip(line, sizes, strict=False):
            axes.set_title(f"{'MNIST' if recipe == 'aevb' else 'Frey Face'}, {size} dimensions")
            for rule in ("elbo", "wake-sleep"):
                row = rows.get(f"{recipe}-{rule}-{size}")
                if row is None:
                    continue
                seen, train, held = np.array(row["curve"]).T
                axes.plot(seen, -train, color=COLOURS[rule], linewidth=1.2, label=f"{RULES[rule]}, training")
                axes.plot(seen, -held, "--", color=COLOURS[rule], linewidth=1.6, label=f"{RULES[rule]}, held out")
                if recipe == "aevb":
                    axes.plot(1.8e7, -RERUN[rule, size], "D", color=COLOURS[rule], markersize=5, clip_on=False,
                              markerfacecolor="none", label=f"{RULES[rule]}, a rerun's test")  # fmt: skip
            axes.set_xscale("log")
        for axes in line[len(sizes) :]:
            axes.set_axis_off()
        line[0].set_ylabel("bound on log p(x), nats")
    panels[0, 0].set_ylim(-180, -90)
    panels[1, 0].set_ylim(0, None)
    for axes in panels[-1]:
        axes.set_xlabel("images seen")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    panels[1, -1].legend(handles, labels, loc="center", frameon=False)
    return figure


def likelihood_figure(rows: dict[str, Any]) -> Figure:
    """The likelihood over images seen: 1,000 and 50,000 training images."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2), SIZES, strict=True):
        for rule, word in RULES.items():
            if (row := rows.get(f"{rule}-{size}")) is not None:
                _likelihood_of(axes, row, rule, word)
        axes.set_xscale("log")
        axes.set_title(f"{size:,} training images")
        axes.set_xlabel("images seen")
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("log p(x), nats")
    return figure


def _likelihood_of(axes: Axes, row: dict[str, Any], rule: str, word: str) -> None:
    seen = [point["images_seen"] for point in row["curve"]]
    for split, style in (("train", "-"), ("test", "--")):
        values = [-point[split][0] for point in row["curve"]]
        axes.plot(seen, values, style, color=COLOURS[rule], linewidth=1.5, label=f"{word}, {split}")


if __name__ == "__main__":
    main(*sys.argv[1:])
