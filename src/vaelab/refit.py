r"""Another prior for a model that is trained: fitted to its codes, with encoder and decoder as they are.

Where codes lie is known only after the training, and rarely is it where the prior is: samples are drawn from places of
which the decoder knows nothing. A prior fitted to the aggregate posterior :math:`q(z) = E_x q(z|x)` is drawn from where
codes are. An autoencoder without a prior (RAE) becomes a generative model by it.

Shapes: N codes, D latent dimensions, M components.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaelab.config import Run, override, to_json
from vaelab.data.datasets import BATCH, EVALUATION_SEED, Dataset
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import Estimate, protocol_of
from vaelab.evaluate.estimate import evaluating
from vaelab.models import VAE
from vaelab.posteriors import Posterior
from vaelab.priors import FlowPrior, MixturePrior, Prior, TwoStage
from vaelab.runs.checkpoint import write_bytes, write_json
from vaelab.runs.folder import FORMAT, RunFolder
from vaelab.runtime import Noise, RowNoise, StepNoise, derived_seed, epoch_order, generator, seeded
from vaelab.specs import Spec

BOUND_SAMPLES = 100  # of the importance-weighted bound on log p(z), where a prior has no density
_HELD_OUT = 10  # one code in so many decides when a training ends

Bound = Callable[[Tensor, Noise], Tensor]  # of codes (B, D): log p(z) or a lower bound on it, (B,) in nats


@final
@dataclass(frozen=True)
class Fitting:
    """How a prior is fitted.

    Args:
        seed: of its first weights, the order of codes and the noise.
        epochs: passes over the codes, at most, of a prior that is trained by gradients.
        batch_size, learning_rate: of these.
        patience: epochs without a better held-out value after which they end.
    """

    seed: int = 0
    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    patience: int = 15


@final
@dataclass(frozen=True)
class Refitted:
    """A model with another prior, and what that is worth.

    Args:
        run: the configuration, with the prior's spec in it.
        model: the model; all but its prior as it was.
        before, after: log p(z) of held-out codes under the old and the new prior, in nats.
        gain: the difference, paired.
        epochs: how many passes the training took; None where there was none.
    """

    run: Run
    model: VAE
    before: Estimate
    after: Estimate
    gain: Estimate
    epochs: int | None


def refit(run: Run, model: VAE, data: Dataset, prior: Spec, how: Fitting | None = None) -> Refitted:
    """Fit a prior to the codes of the training images: one draw from the posterior of each.

    The validation images' codes score the old prior and the new one: nothing is fitted to them, and nothing chosen.

    Args:
        run, model, data: a trained model, on the CPU, and its data.
        prior: the spec of a mixture, a flow or a two-stage prior.
        how: of the fit.

    Raises:
        UsageError: if latents are not any real vectors, the prior is none that can be fitted, or there are too few
            codes.
        FailureError: if the codes, or the training's numbers, are not finite.

    Reference:
        Ghosh et al. (2020), From Variational to Deterministic Autoencoders, section 4. https://arxiv.org/abs/1903.12436
        Dai & Wipf (2019), Diagnosing and Enhancing VAE Models, section 4. https://arxiv.org/abs/1903.05789
    """
    how = how or Fitting()
    if model.space != "real":
        raise UsageError(
            f"--prior {prior.word} is over real vectors, and the latents of --posterior {run.posterior.word} are "
            f"{_LATENTS[model.space]}: only another training gives this model another prior"
        )
    fitted = copy.deepcopy(model)
    with seeded(derived_seed(how.seed, "refit")):
        fitted.prior_part = prior.build(model.posterior_head, model.shape)
    codes = draw_codes(model, data, "train", how.seed)
    epochs = _fit(fitted.prior_part, codes, how)
    fitted.eval()
    held_out = draw_codes(model, data, "validation", EVALUATION_SEED)
    values, hows = zip(*(_score(one, held_out) for one in (model, fitted)), strict=True)
    before, after, gain = (
        Estimate.of(value, "nats", protocol_of(data, "validation", f"log p(z) of a code of each, {words}"))
        for value, words in ((values[0], hows[0]), (values[1], hows[1]), (values[1] - values[0], "after less before"))
    )
    return Refitted(override(run, prior=prior), fitted, before, after, gain, epochs)


_LATENTS = {"sphere": "directions", "categories": "one-hot vectors", "codes": "vectors of a codebook"}


@torch.no_grad()
def draw_codes(model: VAE, data: Dataset, split: str, seed: int) -> Tensor:
    """One draw from the posterior of each image of a split, (N, D), whatever device or batch size computes it.

    Raises:
        FailureError: if a code is not finite.
    """
    device, pieces = data.train.device, list[Tensor]()
    with evaluating(model):
        for start in range(0, len(data.split(split)), BATCH):
            qz = model.posterior(data.scored(split, slice(start, start + BATCH)).x)
            z, _ = cast(Posterior, qz).rsample_and_log_prob((1,), RowNoise(seed, start, device))
            pieces.append(z[0].cpu().float())
    codes = torch.cat(pieces)
    if not codes.isfinite().all():
        raise FailureError(f"not all latents of {data.name} {split} are finite: the model has diverged")
    return codes


def _score(model: VAE, codes: Tensor) -> tuple[NDArray[np.float64], str]:
    """The log-density (N,) of codes under the prior, in nats, or a lower bound on it, and which."""
    part, words = model.prior_part, "under the prior"
    with evaluating(model):  # a VampPrior's codes go through the encoder
        if isinstance(part, TwoStage):
            pieces = [part.log_bound(rows, BOUND_SAMPLES, RowNoise(EVALUATION_SEED, i * BATCH))
                      for i, rows in enumerate(codes.split(BATCH))]  # fmt: skip
            words = f"importance-weighted lower bound k={BOUND_SAMPLES}"
        else:
            pz = model.prior()
            pieces = [pz.log_prob(rows) for rows in codes.split(BATCH)]
    return torch.cat(pieces).double().numpy(), words


# --- fitting --------------------------------------------------------------------------------------------------------


def _fit(part: Prior[Any], codes: Tensor, how: Fitting) -> int | None:
    """Fit a prior to codes; returns the epochs that a training took."""
    loc, scale = codes.mean(0), codes.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)  # of a dimension that is the same for all
    if isinstance(part, MixturePrior):
        return _fit_mixture(part, codes, loc, scale, how.seed)
    if isinstance(part, TwoStage):
        part.start_at(loc, scale)
        return _train(part, part.elbo, codes, how)
    if isinstance(part, FlowPrior):
        part.start_at(loc, scale)
        return _train(part, lambda z, noise: part().log_prob(z), codes, how)
    raise UsageError(f"--prior {part.spec.word} is not fitted to codes: choose mixture, flow or two-stage")


def _fit_mixture(part: MixturePrior, codes: Tensor, loc: Tensor, scale: Tensor, seed: int) -> None:
    """Expectation maximisation, from k-means, on standardised codes: its floor on variances is 1e-6 of theirs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    components, full = part.spec.num_components, part.spec.covariance == "full"
    if len(codes) < 2:
        raise UsageError("a mixture is fitted to two codes at least: give more images")
    if not 1 <= components <= len(codes):
        raise UsageError(f"--components {components}: give 1 to {len(codes)}, as many as there are codes to fit to")
    mixture: Any = GaussianMixture(components, covariance_type="full" if full else "diag", max_iter=300,
                                   random_state=seed)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last of 300 steps is as good as converged
        mixture.fit(((codes - loc) / scale).double().numpy())
    covariances = torch.from_numpy(mixture.covariances_)
    factors = torch.linalg.cholesky(covariances) if full else torch.diag_embed(covariances.sqrt())
    part.start_at(
        torch.from_numpy(mixture.weights_),
        loc + scale * torch.from_numpy(mixture.means_),
        scale.double()[:, None] * factors,
    )


def _train(part: nn.Module, bound: Bound, codes: Tensor, how: Fitting) -> int:
    """Adam on minus the mean of a bound; keeps the weights that are best on a tenth of the codes, which it never sees.

    Raises:
        UsageError: if there are not two codes.
        FailureError: if the held-out value is not finite after an epoch.
    """
    if len(codes) < 2:
        raise UsageError("a prior is trained on some codes and stopped by others: two training images at least")
    order = torch.randperm(len(codes), generator=generator(how.seed, "held out"))
    held_out, fitted_to = codes[order].tensor_split([max(1, len(codes) // _HELD_OUT)])
    optimizer = torch.optim.Adam(part.parameters(), how.learning_rate)
    best, best_epoch, epoch, step = -math.inf, 0, 0, 0
    weights = copy.deepcopy(part.state_dict())
    for epoch in range(1, how.epochs + 1):
        for rows in epoch_order(len(fitted_to), how.seed, epoch).split(how.batch_size):
            loss = -bound(fitted_to[rows], StepNoise(how.seed, step)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            value = float(bound(held_out, RowNoise(EVALUATION_SEED)).mean())
        if not math.isfinite(value):
            raise FailureError(f"log p(z) is {value} after epoch {epoch}: try a smaller --learning-rate")
        if value > best:
            best, best_epoch, weights = value, epoch, copy.deepcopy(part.state_dict())
        elif epoch - best_epoch >= how.patience:
            break
    part.load_state_dict(weights)
    return epoch


# --- the folder -----------------------------------------------------------------------------------------------------


def write(source: RunFolder, out: RunFolder, found: Refitted, how: Fitting, command: str) -> None:
    """Write a run folder like the source's, with the new prior in its configuration and its weights.

    ``config.json`` says under ``refit`` where it comes from and what was gained; ``history.jsonl`` is the source's,
    each record marked as one of the training, under the old prior; ``last.pt`` says no more than which epoch was the
    best, as there is nothing to go on with. What was measured or drawn under the old prior stays behind.

    Args:
        source: of the trained run.
        out: a new folder.
        found, how: the fit.
        command: that made it.
    """
    config, last = source.config(), source.load_last() or {}
    origin = {
        "command": command,
        "from": source.path.resolve().name,
        "from_weights_sha256": source.weights_sha256(),
        "before": {"prior": source.run.prior.word, **found.before.to_json()},
        "after": {"prior": found.run.prior.word, **found.after.to_json()},
        "gain": found.gain.to_json(),
        "epochs": found.epochs,
        **dataclasses.asdict(how),
    }
    resolved = {**config["resolved"], "parameters": found.model.num_parameters()}
    out.save_best(found.model.state_dict())
    out.save_last({"step": last.get("step"), "best": last.get("best"), "stopped": True})
    records = ({**record, "before_refit": True} for record in source.history())
    write_bytes(out.path / "history.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    # The last: a folder without it holds no run.
    content = {**config, "format": FORMAT, "run": to_json(found.run), "resolved": resolved, "refit": origin}
    write_json(out.path / "config.json", content)
