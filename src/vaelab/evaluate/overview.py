"""All that is reported of a model's codes, as far as it is defined for that model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vaelab.data.datasets import Dataset
from vaelab.evaluate import classifiers, latents
from vaelab.evaluate.codebook import codebook_usage
from vaelab.evaluate.elbo import protocol_of
from vaelab.evaluate.estimate import Estimate
from vaelab.evaluate.factors import known_factors
from vaelab.evaluate.undefined import as_defined
from vaelab.models import VAE


def overview(model: VAE, data: Dataset, split: str, limit: int) -> dict[str, dict[str, Any]]:
    """Measure the codes of a split.

    Args:
        model: the trained model; of one with a codebook, the codebook's use is what there is to say.
        data, split: what is encoded.
        limit: the first so many images, where it is not a count of codes; scores against known factors are of all.

    Returns:
        ``metrics``: an ``Estimate`` by name. ``per_dimension``: lists with a number for each latent dimension, or each
        code of a codebook; None where unknown. ``about``: under ``left_out``, if there is any, what cannot be had of
        this model and these data, a sentence each.

    Note:
        The aggregate posterior is of ``latents.FEW`` codes where a density takes passes of a network (IAF): of 10,000
        codes under one another it would take a day. The protocols of both numbers made of it say so.
    """
    if model.space == "codes":
        return _of_codebook(model, data, split)
    codes = latents.encode(model, data, split, limit=limit)
    protocol = protocol_of(data, split, "1 posterior sample", limit)
    aggregated, of_few = codes, protocol
    if codes.slow_densities and len(codes) > latents.FEW:
        aggregated = latents.encode(model, data, split, limit=latents.FEW)
        of_few = protocol_of(data, split, "1 posterior sample", latents.FEW)
    measures: dict[str, Callable[[], dict[str, Estimate]]] = {
        "active units": lambda: {"active_units": latents.active_units(codes, protocol)},
        "mutual information": lambda: {"mutual_information": latents.mutual_information(aggregated, of_few)},
        "aggregate KL": lambda: {"aggregate_kl": latents.aggregate_kl(aggregated, of_few)},
        "two-sample test": lambda: {"two_sample_accuracy": classifiers.two_sample_test(codes, protocol)},
    }
    if data.train.y is not None:
        measures["probes"] = lambda: classifiers.probes(latents.encode(model, data, "train"), codes, protocol)
    metrics, left_out = as_defined(measures)
    dimensions: dict[str, list[Any] | None] = {
        "rate": None if codes.rate is None else codes.rate.mean(0).tolist(),
        "variance_of_means": latents.variance_of_means(codes).tolist() if "active_units" in metrics else None,
        "mean": codes.z.mean(0).tolist(),
        "variance": codes.z.var(0, ddof=1).tolist() if len(codes) > 1 else None,
    }
    if data.factors is not None:
        scores, missing = known_factors(model, data)
        metrics, left_out = metrics | scores, left_out + missing
    about = {"left_out": left_out} if left_out else {}
    return {"metrics": metrics, "per_dimension": dimensions, "about": about}


def _of_codebook(model: VAE, data: Dataset, split: str) -> dict[str, dict[str, Any]]:
    usage = codebook_usage(model, data, split)
    protocol = protocol_of(data, split, "codes of all sites")
    metrics = {"perplexity": usage.perplexity(protocol), "codes_used": usage.used(protocol)}
    why = "Latents are codes of a codebook: no active units, mutual information, aggregate KL, two-sample test, probes."
    return {"metrics": metrics, "per_dimension": {"code_counts": usage.counts.tolist()}, "about": {"left_out": [why]}}
