"""``vaelab doctor``."""

from __future__ import annotations

import dataclasses
import json as json_

from rich.console import Console

from vaelab.cli.common import RunPath
from vaelab.errors import FailureError


def doctor(run: RunPath, /, json: bool = False) -> None:
    """Say what is wrong with a run, and what to do next: collapse, holes, over-fitting, NaN, data, size of the latent.

    Looks at the run's history and at some thousand training and validation images; the test images stay untouched.

    Args:
        json: print JSON instead of text.
    """
    from vaelab.diagnose import diagnose, examine
    from vaelab.runs.folder import RunFolder
    from vaelab.runs.loading import data_of, load_model

    folder = RunFolder.open(run)
    failure = folder.failure()
    # A run that failed may have saved no weights; of another, missing ones are an error and no sign of health.
    model = load_model(run) if failure is None or (run / "best_model.pth").exists() else None
    history = folder.history()
    if failure is None and not history:
        raise FailureError(f"{run} has lost its history.jsonl: train it again for a verdict")
    symptoms = examine(folder.run, model, data_of(folder), history, failure)
    findings = diagnose(symptoms)
    if json:
        print(json_.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return
    console = Console(highlight=False)
    if not findings:
        console.print(f"{run}: healthy. Nothing was found, of all that vaelab doctor looks for.", markup=False)
    for finding in findings:
        colour = "red" if finding.kind == "illness" else "yellow"
        console.print(f"[bold {colour}]{finding.name}[/] ({finding.kind})")
        console.print(f"  {finding.evidence}\n  [bold]next:[/] {finding.remedy}", soft_wrap=True)
    if model is not None and symptoms.rate is None:
        console.print("Single dimensions have no rate under this posterior and prior: whether the latent is too large "
                      "or too small was not looked at.", soft_wrap=True)  # fmt: skip
