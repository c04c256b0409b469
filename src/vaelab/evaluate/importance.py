r"""The likelihood by importance sampling: :math:`\log p(x) \ge E \log \frac1k \sum_k p(x, z_k) / q(z_k|x)`.

Shapes: N data set, B images at a time, S samples per image, k samples per bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vaelab.data.datasets import EVALUATION_SEED, Dataset
from vaelab.data.guard import require_fit
from vaelab.divergences import log_mean_exp
from vaelab.errors import UsageError
from vaelab.evaluate.elbo import bound_protocol
from vaelab.evaluate.estimate import Estimate
from vaelab.evaluate.pieces import Rows, Values, decode_bytes, in_pieces, join, not_finite
from vaelab.models import VAE
from vaelab.runtime import RowNoise, SampleNoise
from vaelab.training.compiling import compiled_log_px

# Decodes at a time where memory allows more: what stays in a core's cache, and what fills a GPU.
_CPU_DECODES, _GPU_DECODES = 1000, 65_536


def sample_counts(num_samples: int) -> tuple[int, ...]:
    """The k at which the bound is reported: 1, 10, 100, 1000 and S, as far as each divides the next.

    Nested groups of the same draws make the bounds rise with k by construction (Burda et al., 2016, theorem 1, holds
    for averages over subsets), so that a reader sees whether the last has converged.

    Example:
        >>> sample_counts(5000), sample_counts(64)
        ((1, 10, 100, 1000, 5000), (1, 64))
    """
    counts = [k for k in (1, 10, 100, 1000) if k < num_samples and num_samples % k == 0]
    return (*counts, num_samples)


def iwae_bounds(log_w: Tensor) -> dict[int, Tensor]:
    r"""The IWAE bound of every example at each k of ``sample_counts``, from the same S draws, in nats.

    At :math:`k < S` it is the average of the bounds of S/k disjoint groups: :math:`\frac{k}{S} \sum_g \log \frac1k
    \sum_{i \in g} w_i`.

    Args:
        log_w: (S, B), log importance weights.

    Returns:
        k to (B,).

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, eq. 8. https://arxiv.org/abs/1509.00519
    """
    return {k: log_mean_exp(log_w.unflatten(0, (-1, k)).transpose(0, 1)).mean(0) for k in sample_counts(len(log_w))}


def effective_sample_size(log_w: Tensor) -> Tensor:
    r"""Kong's :math:`(\sum w)^2 / \sum w^2` over the first axis: how many equal weights these are worth; (B,).

    The weights' relative variance is :math:`v \approx S/\mathrm{ESS} - 1`, and the bound lies about :math:`v / 2S`
    below the likelihood.

    Reference:
        Kong (1992), A Note on Importance Sampling Using Standardized Weights, technical report 348, Chicago.
    """
    return torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0))


def importance_rows(
    model: VAE,
    data: Dataset,
    split: str = "test",
    *,
    num_samples: int = 5000,
    rows: int | None = None,
    first_row: int = 0,
    memory: int = 2**30,
    bf16: bool = False,
    workers: int = 1,
    compiling: bool = False,
) -> Iterator[Rows]:
    """Importance-sample a split, a few images at a time, so that a caller can show progress, save and go on later.

    Noise belongs to the rows: neither the memory, nor the number of workers, nor where it was gone on changes a number.

    Args:
        model: the trained model.
        data: the data set under the protocol to score.
        split: train, validation or test.
        num_samples: S.
        rows: only the first so many images of the split; None: all.
        first_row: where to begin.
        memory: bytes that the activations may take, all workers together.
        bf16: take the decoder's products in bf16; weights, softplus and sums stay in fp32.
        workers: threads that score images side by side on a CPU, each with one thread for its products.
        compiling: compile log p(x|z) first (see ``can_compile``): some ten seconds that long work earns back. Numbers
            change by rounding.

    Returns:
        Rows of the split, with ``k=1``, ``k=10``, ... (the bound on log p(x) in nats) and ``ess`` of each.

    Raises:
        UsageError: if ``num_samples`` or ``memory`` allows nothing.
        FailureError: if a weight is not finite, naming the image.
    """
    if num_samples < 1:
        raise UsageError(f"--num-samples {num_samples}: must be at least 1")
    size = len(data.split(split)) if rows is None else min(rows, len(data.split(split)))
    device, decodes = data.train.device, _decodes(model, data.train.device, memory, workers)
    images = max(1, decodes // num_samples)
    pieces = [slice(start, min(start + images, size)) for start in range(first_row, size, images)]

    def score(piece: slice) -> Values:
        batch = data.scored(split, piece)
        # A block of rows shares a generator elsewhere; here an image has thousands of samples and one of its own.
        noise = SampleNoise(RowNoise(EVALUATION_SEED, piece.start, device, block=1), num_samples)
        at_once = max(1, decodes // len(batch.x))
        parts: list[Tensor] = []
        # autocast keeps weights that it has cast, behind a lock of the process. A thread that compiles comes to it with
        # Python's lock in hand; one that drops such casts asks for Python's behind it. Where it compiles, none is kept.
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=not compiling):
            for noise.first in range(0, num_samples, at_once):
                count = min(at_once, num_samples - noise.first)
                parts.append(model.draw(batch.x, num_samples=count, noise=noise).log_w)
        log_w = torch.cat(parts)
        log_w = (log_w.cpu() if device.type == "mps" else log_w).double()  # Apple's GPUs have no float64
        bad = (~torch.isfinite(log_w)).any(0).nonzero()
        if len(bad):
            raise not_finite("an importance weight", piece.start + int(bad[0]), f"of the {split} split")
        values = {f"k={k}": bound for k, bound in iwae_bounds(log_w).items()}
        values["ess"] = effective_sample_size(log_w)
        # Copies: a few numbers of torch's, kept for each image, would hold the large blocks beside them in memory.
        return {name: value.cpu().numpy().copy() for name, value in values.items()}

    found = in_pieces(model, pieces, score, workers)
    return _compiling(model, found) if compiling else found


def _decodes(model: VAE, device: torch.device, memory: int, workers: int) -> int:
    """How many latents each worker may decode at a time."""
    needed = workers * decode_bytes(model)
    if memory < needed:
        raise UsageError(f"--memory {memory // 2**20}: one image alone takes {-(-needed // 2**20)} MiB to decode")
    return min(_CPU_DECODES if device.type == "cpu" else _GPU_DECODES, memory // needed)


def _compiling(model: VAE, rows: Iterator[Rows]) -> Iterator[Rows]:
    with compiled_log_px(model):
        yield from rows


def nll(
    model: VAE, data: Dataset, split: str = "test", *, num_samples: int = 5000, rows: int | None = None, **options: Any
) -> dict[str, Estimate]:
    r"""The negative log-likelihood by importance sampling at each k, in nats per example, and the weights' ESS.

    An upper bound in expectation at every k, that falls with k towards :math:`-\log p(x)`; how far it still has to fall
    is about :math:`v/2k` where the weights are well behaved, and more where they are not: see ``ess``.

    Args:
        model, data, split, num_samples, rows: see ``importance_rows``; so are ``options``.

    Returns:
        ``nll_k`` for each k, and ``ess`` (in samples).

    Raises:
        UsageError: if the likelihood is none of these data.
    """
    require_fit(model.likelihood_head, data, (split,))
    values = join(importance_rows(model, data, split, num_samples=num_samples, rows=rows, **options))
    return summarize(values, num_samples, lambda how: bound_protocol(model, data, split, how, rows))


def summarize(values: Values, num_samples: int, protocol: Callable[[str], str]) -> dict[str, Estimate]:
    """Estimates from the values of all rows, as ``importance_rows`` yields them.

    Args:
        values: the joined rows.
        num_samples: S.
        protocol: makes the protocol of an estimator's words.
    """
    found = {
        f"nll_{k}": Estimate.of(-values[f"k={k}"], "nats", protocol(f"IWAE k={k}")) for k in sample_counts(num_samples)
    }
    ess = Estimate.of(values["ess"], "samples", protocol(f"effective of {num_samples:,} importance samples"))
    return {**found, "ess": ess}
