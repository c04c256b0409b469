"""What readers are told: metrics in words, numbers with as many places as mean something, caveats, times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

# What a reader sees; a name that ends in _ stands for all that begin so.
LABELS = {
    "negative_elbo": "-ELBO (distortion + rate)",
    "distortion": "distortion, -log p(x|z)",
    "rate": "rate, KL(q(z|x) || p(z))",
    "objective": "distortion + {beta:g} rate",
    "bits_per_dim": "-ELBO in bits a dimension",
    "nll_": "-log p(x) <=, IWAE k={}",
    "ess": "effective sample size",
    "nll_ais": "-log p(x) <=, AIS",
    "ais_ess": "  effective chains",
    "ais_acceptance": "  acceptance of its moves",
    "bdmc_lower": "simulated: log p(x) >=",
    "bdmc_upper": "simulated: log p(x) <=",
    "bdmc_gap": "simulated: BDMC gap",
    "perplexity": "perplexity of the codes",
    "codes_used": "codes in use",
    "active_units": "active units",
    "mutual_information": "mutual information I(x; z)",
    "aggregate_kl": "KL(q(z) || p(z))",
    "two_sample_accuracy": "telling q(z) from p(z)",
    "linear_probe": "linear probe of the codes",
    "knn_probe": "5 nearest neighbours of the codes",
    "total_correlation": "total correlation of the codes",
    "mutual_information_gap": "mutual information gap (MIG)",
    "disentanglement": "disentanglement of the codes",
    "completeness": "completeness of the codes",
    "informativeness": "informativeness of the codes",
    "mse": "squared error of a reconstructed pixel",
    "psnr": "reconstruction PSNR",
    "ssim": "reconstruction SSIM",
    "ais_gain": "  tighter than IWAE by",
    "frechet": "Fréchet distance of samples",
    "frechet_floor": "  of real images (floor)",
    "precision": "precision of samples",
    "recall": "recall of samples",
}


def readable(name: str) -> str:
    r"""A file's name as text that can be written everywhere: bytes of it that are no UTF-8 as in ``caf\xe9``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def images(count: int) -> str:
    """So many images, in words."""
    return f"{count:,} image{'s' * (count != 1)}"


def pixels(protocol: str, channels: int) -> str:
    """What was done to the pixels, in words; images of one channel are grey, of others in colour."""
    return {
        "grey": "grey pixels" if channels == 1 else "colour pixels",
        "dynamic": "dynamic binarization",
        "static": "static binarization",
        "threshold": "threshold binarization",
    }[protocol]


def label(key: str, beta: float | None) -> str:
    """A metric's name in words; beta is that of the objective, or None where it is none's in particular."""
    stem, _, number = key.rpartition("_")
    words = LABELS.get(key) or (LABELS.get(f"{stem}_", key) if number.isdecimal() else key)
    return words.replace("{beta:g}", "beta" if beta is None else f"{beta:g}").replace("{}", number)


@final
@dataclass(frozen=True)
class Row:
    """A metric as a table shows it: one whose name begins with spaces belongs to the one above."""

    name: str
    value: str
    stderr: str
    unit: str
    n: str
    protocol: str


def rows_of(metrics: Mapping[str, Any], beta: float) -> dict[str, Row]:
    """Estimates as ``metrics.json`` holds them, each with as many places as mean something; a missing one is empty."""
    found: dict[str, Row] = {}
    for key, estimate in metrics.items():
        value, stderr, unit = estimate["value"], estimate["stderr"], estimate["unit"]
        places = 2 if abs(value) >= 5 or unit in ("nats", "units") else 4
        # Over a few extractors there is a spread, and the number's protocol says of what.
        spread = " s.d." if "mean and s.d." in estimate["protocol"] else ""
        error = "" if stderr is None else f"{stderr:.{places}f}{spread}"
        found[key] = Row(label(key, beta), f"{value:.{places}f}", error, unit.partition(" (")[0],
                         f"{estimate['n']:,}", estimate["protocol"])  # fmt: skip
    return found


def title(data: Mapping[str, Any], split: str, protocol: str, found: Mapping[str, Any]) -> str:
    """Which images a table is of: data set, split, how many, and what was done to their pixels."""
    words = found.get("about", {}).get("pixels") or pixels(protocol, data["shape"][0])
    return f"{data['data']} {split} ({images(data[split])}), {words}"


def notes(found: dict[str, Any]) -> list[str]:
    """What must be said beside the numbers."""
    said: list[str] = []
    floor = found.get("about", {}).get("cross_entropy_floor")
    if floor is not None:
        said.append("Cross-entropy on pixels that are not binary is no likelihood, and cannot go below "
                    f"{floor:.2f} nats here (the mean entropy of the pixels).")  # fmt: skip
    said += found.get("about", {}).get("left_out", [])
    information = found["metrics"].get("mutual_information")
    if information is not None:
        about = information["protocol"]
        said.append(f"Mutual information and KL(q(z) || p(z)) are of the {about[about.index('aggregate of') :]}.")
    return said


def cost(record: dict[str, Any], joined: str = ", ") -> str:
    """What the validation images cost in an epoch, in words: distortion and, if there is one, rate, in nats."""
    terms = [term for term in ("distortion", "rate") if f"validation_{term}" in record]
    return joined.join(f"{term} {record[f'validation_{term}']:.2f}" for term in terms) + " nats"


def setting(value: Any) -> str:
    """A setting's value for people.

    Example:
        >>> setting(None), setting(0.5), setting((512, 256))
        ('–', '0.5', '512 256')
    """
    return "–" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(7.2), duration(400), duration(9000)
        ('7 s', '7 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
