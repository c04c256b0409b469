"""Specs of approximate posteriors q(z|x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from vaelab.specs.spec import Spec, option, positive


@final
@dataclass(frozen=True)
class DiagonalNormal(Spec):
    """Approximate posterior with independent normal latents: q(z|x) = N(loc(x), diag(scale(x)^2))."""

    word: ClassVar[str] = "diagonal-normal"
    latent_dim: int = positive(20, "number of latent dimensions", aliases=("z_dim",))


@final
@dataclass(frozen=True)
class VectorQuantized(Spec):
    """Codes: each site of a grid takes the closest vector of a learned codebook; nothing is drawn."""

    word: ClassVar[str] = "vq"
    grid: tuple[int, int] = positive((7, 7), "height and width of the grid as which the encoder's features are read")
    num_codes: int = positive(512, "vectors in the codebook")
    code_dim: int = positive(64, "dimensions of such a vector")
    commitment: float = option(0.25, "weight on the squared distance of the encoder's vectors from their codes")
    codebook_decay: float = option(0.99, "decay, a step, of the averages that the codebook is made of", below=1)
    restart_below: float = option(0.01, "restart codes used less than this part of an even share (0: never)", below=1)


@final
@dataclass(frozen=True)
class GumbelSoftmax(Spec):
    """One-hot latents: each site takes one of several classes; gradients by a softmax with Gumbel noise."""

    word: ClassVar[str] = "gumbel-softmax"
    sites: int = positive(20, "one-hot vectors")
    classes: int = positive(10, "classes of each")
    temperature: float = positive(
        0.5, "of the softmax whose gradient is taken: higher, more bias; lower, more variance"
    )


@final
@dataclass(frozen=True)
class Deterministic(Spec):
    """A latent vector that is a function of the image: an autoencoder's code, with no distribution."""

    word: ClassVar[str] = "deterministic"
    latent_dim: int = positive(20, "number of latent dimensions", aliases=("z_dim",))


@final
@dataclass(frozen=True)
class FullNormal(Spec):
    """Approximate posterior with correlated normal latents: q(z|x) = N(loc(x), L(x) L(x)^T)."""

    word: ClassVar[str] = "full-normal"
    latent_dim: int = positive(20, "number of latent dimensions", aliases=("z_dim",))


@final
@dataclass(frozen=True)
class PlanarFlow(Spec):
    """Approximate posterior that planar transforms make of a normal: each bends the space across one direction."""

    word: ClassVar[str] = "planar"
    latent_dim: int = positive(20, "number of latent dimensions", aliases=("z_dim",))
    num_transforms: int = positive(10, "transforms, one after the other")


@final
@dataclass(frozen=True)
class RadialFlow(Spec):
    """Approximate posterior that radial transforms make of a normal: each draws it to a point or pushes it away."""

    word: ClassVar[str] = "radial"
    latent_dim: int = positive(20, "number of latent dimensions", aliases=("z_dim",))
    num_transforms: int = positive(10, "transforms, one after the other")


@final
@dataclass(frozen=True)
class IAF(Spec):
    """Approximate posterior that an inverse autoregressive flow makes of a normal."""

    word: ClassVar[str] = "iaf"
    latent_dim: int = positive(20, "number of latent dimensions", aliases=("z_dim",))
    num_transforms: int = positive(2, "transforms, one after the other")
    hidden_dims: tuple[int, ...] = positive((320, 320), "units of each hidden layer of a transform's network")


@final
@dataclass(frozen=True)
class VonMisesFisher(Spec):
    """Approximate posterior on the unit sphere, around a direction: q(z|x) ~ exp(kappa(x) loc(x)'z)."""

    word: ClassVar[str] = "vmf"
    latent_dim: int = positive(20, "dimensions of the space around the sphere, 2 at least", aliases=("z_dim",))
