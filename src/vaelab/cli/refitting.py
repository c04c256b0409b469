"""Commands that change a part of a trained model: ``refit``."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vaelab import specs
from vaelab.cli.common import RunPath, at_least, opened
from vaelab.errors import UsageError
from vaelab.specs import Spec

if TYPE_CHECKING:
    from vaelab.refit import Refitted

Kind = Literal["mixture", "flow", "two-stage"]


def refit(
    run: RunPath,
    /,
    prior: Kind = "mixture",
    components: int | None = None,
    covariance: Literal["full", "diagonal"] | None = None,
    flow_kind: Literal["coupling", "maf", "nsf"] | None = None,
    transforms: int | None = None,
    hidden_dims: tuple[int, ...] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    out: Annotated[Path | None, tyro.conf.arg(help="the new run folder; default: RUN-PRIOR, beside RUN")] = None,
) -> None:
    """Fit another prior to the codes of a trained run, and write a new run folder: samples come from where codes are.

    A mixture of normals is fitted by expectation maximisation; a normalising flow, or a second VAE on the codes, is
    trained until a held-out tenth of them is scored no better. Encoder and decoder stay as they are. Prints what the
    codes of the validation images cost under the old prior and under the new one, in nats.

    Args:
        prior: mixture, flow or two-stage; the last has no density: it makes samples, and no likelihood or KL.
        components: of a mixture (default: 10).
        covariance: of a mixture's components (default: full).
        flow_kind: affine coupling, affine autoregressive (maf, the default) or autoregressive splines (nsf).
        transforms: of a flow (default: 4).
        hidden_dims: units of each hidden layer of a flow's or a second stage's networks (default: 128 128; 512 512).
        epochs: passes over the codes, at most (default: 200; not of a mixture, nor are the next three).
        batch_size: codes a step (default: 256).
        learning_rate: of Adam (default: 0.001).
        patience: stop after so many epochs without a better held-out value (default: 15).
        seed: of the fit: first weights, order and noise.
        threads: CPU threads; default: torch's.
    """
    at_least(0, most=2**32 - 1, seed=seed)  # of NumPy's generators, which scikit-learn uses
    at_least(1, threads=threads)
    choices = {"components": components, "covariance": covariance, "flow_kind": flow_kind, "transforms": transforms,
               "hidden_dims": hidden_dims, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
               "patience": patience}  # fmt: skip
    given = {name: value for name, value in choices.items() if value is not None}
    spec = _spec(prior, given)

    from vaelab import refit as refitting
    from vaelab.drawing import pictures
    from vaelab.runs.folder import RunFolder
    from vaelab.runtime import threads as computing_with
    from vaelab.slots import parts_of

    source, path = RunFolder.open(run), out or run.resolve().with_name(f"{run.resolve().name}-{prior}")
    target = RunFolder.create(path, resumable=False)
    how = refitting.Fitting(seed, **{name: given[name] for name in _TRAINED if name in given})
    with computing_with(threads):
        trained, model, data = opened(run)
        found = refitting.refit(trained, model, data, spec, how)
        words = ["vaelab", *parts_of(trained, whole=False), "refit", run.resolve().name, "--prior", prior]
        command = shlex.join([*words, *_words(given), "--seed", str(seed), "--out", path.name])
        refitting.write(source, target, found, how, command)
        pictures.draw_at_end(found.run, found.model, data, target.history(), target.best_epoch(), path)
    _say(found, trained.prior, spec)
    logging.getLogger("vaelab").info("into %s; test numbers: vaelab evaluate %s", path, shlex.quote(str(path)))


_TRAINED = ("epochs", "batch_size", "learning_rate", "patience")
_OF: dict[str, tuple[str, ...]] = {
    "mixture": ("components", "covariance"),
    "flow": ("flow_kind", "transforms", "hidden_dims", *_TRAINED),
    "two-stage": ("hidden_dims", *_TRAINED),
}


def _spec(prior: Kind, given: dict[str, Any]) -> Spec:
    """The spec of what is asked for."""
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if name not in _OF[prior]:
            owners = " and ".join(f"--prior {kind}" for kind, names in _OF.items() if name in names)
            raise UsageError(f"{flag} belongs to {owners}: leave it out of --prior {prior}")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str) and not 0 < number < float("inf"):
                raise UsageError(f"{flag} {number}: must be a number greater than 0")
    if prior == "mixture":
        return specs.Mixture(given.get("components", 10), given.get("covariance", "full"))
    if prior == "two-stage":
        return specs.TwoStage(**_renamed(given, hidden_dims="stage_hidden_dims"))
    names = {"flow_kind": "flow_kind", "transforms": "num_transforms", "hidden_dims": "hidden_dims"}
    return specs.FlowPrior(**_renamed(given, **names))


def _renamed(given: dict[str, Any], **names: str) -> dict[str, Any]:
    return {field: given[name] for name, field in names.items() if name in given}


def _words(given: dict[str, Any]) -> list[str]:
    """What was chosen, as flags."""
    words: list[str] = []
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _say(found: Refitted, old: Spec, new: Spec) -> None:
    """Print what held-out codes cost under the old prior and under the new one."""
    for word, spec, one in (("before", old, found.before), ("after", new, found.after)):
        print(f"{word:7} {spec.word:16} log p(z) = {one.value:9.2f} ± {one.stderr:.2f} nats   {one.protocol}")
    trained = "" if found.epochs is None else f", after {found.epochs} epochs"
    print(f"{'gain':24} {found.gain.value:20.2f} ± {found.gain.stderr:.2f} nats a code (paired){trained}")
    if found.gain.value < -2 * found.gain.stderr:
        print("The old prior is the better one for these codes.")
