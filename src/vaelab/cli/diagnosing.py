"""``vaelab doctor``."""

from __future__ import annotations

import dataclasses
import json as json_

from rich.console import Console

from vaelab.cli.common import RunPath, opened


def doctor(run: RunPath, /, json: bool = False) -> None:
    """Say what is wrong with a run, and what to do next: collapse, holes, over-fitting, NaN, data, size of the latent.

    Looks at the run's history and at some thousand training and validation images; the test images stay untouched.

    Args:
        json: print JSON instead of text.
    """
    from vaelab.diagnose import diagnose, examine
    from vaelab.folder import RunFolder
    from vaelab.loading import load_data, require_same_data

    folder = RunFolder.open(run)
    failure, history = folder.failure(), folder.history()
    if (run / "best_model.pth").exists():
        config, model, data = opened(run)
    else:
        config, model, data = folder.run, None, load_data(folder.run)
        require_same_data(folder, data)
    findings = diagnose(examine(config, model, data, history, failure))
    if json:
        print(json_.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return
    console = Console()
    if not findings:
        console.print(f"{run}: healthy. Nothing was found, of all that vaelab doctor looks for.", highlight=False)
    for finding in findings:
        colour = "red" if finding.kind == "illness" else "yellow"
        console.print(f"[bold {colour}]{finding.name}[/] ({finding.kind})", highlight=False)
        console.print(f"  {finding.evidence}\n  [bold]next:[/] {finding.remedy}", highlight=False, soft_wrap=True)
