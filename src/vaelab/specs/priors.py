"""Specs of priors p(z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from vaelab.specs.spec import Spec, option, positive


@final
@dataclass(frozen=True)
class StandardNormal(Spec):
    """Prior p(z) = N(0, I)."""

    word: ClassVar[str] = "standard-normal"


@final
@dataclass(frozen=True)
class Mixture(Spec):
    """Prior that is a learned mixture of normals."""

    part: ClassVar[str] = "vaelab.priors:MixturePrior"
    word: ClassVar[str] = "mixture"
    num_components: int = positive(10, "components of the mixture")
    covariance: Literal["diagonal", "full"] = option("diagonal", "of a component: independent dimensions, or any")


@final
@dataclass(frozen=True)
class VampPrior(Spec):
    """Prior that is a mixture of the posteriors of learned pseudo-inputs."""

    word: ClassVar[str] = "vamp"
    num_components: int = positive(500, "pseudo-inputs, each with a component of the mixture")


@final
@dataclass(frozen=True)
class UniformCodes(Spec):
    """Prior of codes: at each site every vector of the codebook is equally likely."""

    word: ClassVar[str] = "uniform-codes"


@final
@dataclass(frozen=True)
class UniformCategories(Spec):
    """Prior of one-hot latents: at each site every class is equally likely."""

    word: ClassVar[str] = "uniform-categories"


@final
@dataclass(frozen=True)
class FlowPrior(Spec):
    """Prior that a learned normalising flow makes of N(0, I)."""

    word: ClassVar[str] = "flow"
    flow_kind: Literal["coupling", "maf", "nsf"] = option(
        "maf", "transforms: affine coupling, affine autoregressive, or autoregressive splines"
    )
    num_transforms: int = positive(4, "transforms, one after the other")
    hidden_dims: tuple[int, ...] = positive((128, 128), "units of each hidden layer of a transform's network")


@final
@dataclass(frozen=True)
class UniformSphere(Spec):
    """Prior that is uniform on the unit sphere (for --posterior vmf)."""

    word: ClassVar[str] = "uniform-sphere"


@final
@dataclass(frozen=True)
class TwoStage(Spec):
    """Prior that is a second, small VAE on the latents of the first: fitted by ``vaelab refit``, without a density."""

    word: ClassVar[str] = "two-stage"
    stage_hidden_dims: tuple[int, ...] = positive((512, 512), "units of each hidden layer of the second VAE's networks")
