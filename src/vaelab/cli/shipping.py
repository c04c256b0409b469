"""Commands that make something to give away: ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vaelab import __version__
from vaelab.cli.common import RunPath, opened, write
from vaelab.errors import UsageError
from vaelab.labels import readable


def export(
    run: RunPath, /, format: Literal["onnx", "safetensors"] = "onnx", opset: int | None = None, out: Path | None = None
) -> None:
    """Write a run's model for use elsewhere, and check it: encoder and decoder in ONNX, or weights in safetensors.

    The ONNX encoder gives the mean of q(z|x), or the code that stands for it, and where known the standard deviation,
    the decoder the mean of p(x|z), for any number of rows; both run in onnxruntime without torch or vaelab.
    Every output is compared with the model's, and files are written only if they agree.

    Args:
        format: onnx (encoder.onnx, decoder.onnx) or safetensors (model.safetensors, with its configuration).
        opset: version of ONNX's operators, 18 to 23 (default: 18).
        out: the folder; default: RUN/export. What it holds under the same names is replaced.
    """
    from vaelab import export as exporting
    from vaelab.runs.folder import RunFolder

    if opset is not None and format != "onnx":
        raise UsageError(f"--opset {opset} belongs to --format onnx: leave it out")
    folder = out or run / "export"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: choose another folder")
    _, model, data = opened(run)
    config = RunFolder.open(run).config()
    x = data.validation.rows(slice(0, max(exporting.BATCHES))).x
    if format == "safetensors":
        content = exporting.to_safetensors(model, config)
        exporting.check_safetensors(model, content, x)
        write(folder / "model.safetensors", content)
        print(f"  {len(content) / 2**20:.1f} MiB; read back, its encoder and decoder give the model's numbers exactly")
        return
    number = exporting.OPSET if opset is None else opset
    about = {**description(run, config), "opset": str(number)}
    graphs: dict[exporting.Graph, Any] = {"encoder": x, "decoder": exporting.codes_to_check(model, x)}
    made = {graph: exporting.to_onnx(model, graph, about, opset=number) for graph in graphs}
    checked = {graph: exporting.parity(model, graph, made[graph], inputs) for graph, inputs in graphs.items()}
    for graph, content in made.items():
        write(folder / f"{graph}.onnx", content)
        differences = ", ".join(f"{one.output} {one.difference:.1e}" for one in checked[graph])
        print(f"  opset {number}, {len(content) / 2**20:.1f} MiB; largest difference from the model: {differences}")


def description(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a file says of where it comes from."""
    from vaelab.export import portable
    from vaelab.runs.folder import RunFolder

    data = config["data"]
    return {
        "version": __version__,
        "recipe": config["run"]["recipe"],
        "data": data["data"],
        "protocol": data["protocol"],
        "shape": data["shape"],
        "pixels": "float32 in [0, 1]",
        "weights_sha256": RunFolder(run).weights_sha256(),
        "run": portable(config)["run"],
    }


def report(run: RunPath, /, out: Path | None = None) -> None:
    """Tell a run on one page: curves, pictures, numbers with errors and protocol, the doctor's findings, its origin.

    Writes report.html, which holds all that it shows and needs no network, and a model card, MODEL_CARD.md. What
    vaelab evaluate has measured is shown; without that, what takes seconds is measured first.

    Args:
        out: the HTML file to write (the card goes beside it); default: RUN/report.html. What is there is replaced.
    """
    from vaelab import report as reporting
    from vaelab.progress import Bar
    from vaelab.runs.checkpoint import write_bytes

    target = out or run / "report.html"
    if target.suffix != ".html":
        raise UsageError(f"--out {target}: a report is an .html file")
    facts = reporting.gather(run, Bar())
    write(target, readable(reporting.html(facts)).encode())
    card = target.with_name("MODEL_CARD.md" if out is None else f"{target.stem}.md")
    write_bytes(card, readable(reporting.card(facts)).encode())
    print(card)
