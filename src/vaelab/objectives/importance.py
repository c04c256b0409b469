"""Bounds from several importance samples, and gradients that keep their encoder's signal.

Shapes: K samples of a bound, M bounds of an example, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self, cast, final

from vaelab.errors import UsageError
from vaelab.objectives.objective import Group, Loss, Objective, Parts, two_sides
from vaelab.specs.spec import option, positive

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleDict, Parameter

    from vaelab.models import VAE, Batch, Draw
    from vaelab.posteriors import Posterior
    from vaelab.runtime import Noise


@dataclass(frozen=True)
class Growing(Objective):
    r"""A bound of K importance samples, :math:`E \log \frac1K \sum_k w_k`, with :math:`w_k = p(x, z_k) / q(z_k|x)`.

    Args:
        num_samples: K.
        warm_samples, warm_epochs: train with fewer samples first, as in ``(1, 5), (100, 20)``: one sample for 100
            epochs, then five for 20. Monitored is the bound with K from the first epoch on, best counts after these.

    Raises:
        UsageError: for warm samples without their epochs.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, eq. 8. https://arxiv.org/abs/1509.00519
    """

    num_samples: int = positive(5, "importance samples of a bound (K)")
    _: KW_ONLY
    warm_samples: tuple[int, ...] = positive((), "train with so many samples first, one after the other")
    warm_epochs: tuple[int, ...] = positive((), "epochs with each of these")

    def __post_init__(self) -> None:
        if len(self.warm_samples) != len(self.warm_epochs):
            raise UsageError(
                f"--warm-samples {self.warm_samples} and --warm-epochs {self.warm_epochs}: each count needs epochs"
            )

    @property
    def annealing_epochs(self) -> float:
        """Epochs until K samples are drawn."""
        return float(sum(self.warm_epochs))

    def at(self, epoch: float) -> Self:
        """The bound with the number of samples that is drawn at ``epoch``."""
        ends = zip(accumulate(self.warm_epochs), self.warm_samples, strict=True)
        count = next((samples for end, samples in ends if epoch < end), self.num_samples)
        return replace(self, num_samples=count, warm_samples=(), warm_epochs=())

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Minus the bound."""
        return -means["bound"]


class Few(NamedTuple):
    """Samples of a bound, some of which carry its gradient.

    Args:
        parts: bound, distortion and rate of all the samples, as ``weighed_parts``; without gradient.
        log_w: log weights of all samples (K, M, B); without gradient.
        chosen: which of the K were chosen, (J, M, B).
        chosen_log_w: log weights of these, (J, M, B); with gradient.
    """

    parts: Parts
    log_w: Tensor
    chosen: Tensor
    chosen_log_w: Tensor


@dataclass(frozen=True)
class ThroughFew(Growing):
    r"""A bound of K importance samples whose gradient may flow through few of them.

    Args:
        num_samples, warm_samples, warm_epochs: as in ``Growing``.
        backward_samples: J; send the gradient through J of the K samples of a bound, drawn by their weights. A gradient
            :math:`\sum_k \tilde w_k g_k`, with :math:`\tilde w` the normalised weights, is the mean of :math:`g_j` over
            these J, on average: few weights count, and a backward pass costs twice a forward one. None: through all.

    Raises:
        UsageError: for ``backward_samples`` with what would score the chosen otherwise than among all, as the network
            is run twice: batch norm, dropout, and a likelihood that sets its sigma by what it scores.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, section 3 on sampling one of the K for
        the backward pass. https://arxiv.org/abs/1509.00519
    """

    _: KW_ONLY
    backward_samples: int | None = positive(
        None, "send the gradient through so many of a bound's, drawn by weight; default: through all"
    )

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """One group of all the model's parameters."""
        self.require_alike(model)
        return super().groups(model, networks)

    def require_alike(self, model: VAE) -> None:
        """Refuse a gradient through few where these would be scored otherwise than among all.

        Raises:
            UsageError: for batch norm, dropout, and a likelihood that sets its sigma by what it scores.
        """
        from vaelab.networks import batch_norms, has_dropout

        if self.backward_samples is None:
            return
        if batch_norms(model):
            raise UsageError("--backward-samples runs the network on all samples and again on some, which batch norm "
                             "would normalise otherwise: leave one out")  # fmt: skip
        if has_dropout(model):
            raise UsageError("--backward-samples runs the network on all samples and again on some, for which "
                             "dropout would draw other masks: leave one out")  # fmt: skip
        if model.likelihood_head.spec.word == "optimal-gaussian":
            raise UsageError("--backward-samples scores images twice, and --likelihood optimal-gaussian would set its "
                             "sigma twice: take --likelihood gaussian, or leave one out")  # fmt: skip

    def _few(self) -> int | None:
        """J where a gradient is wanted and goes through few, else None."""
        import torch

        few = self.backward_samples
        return few if few is not None and few < self.num_samples and torch.is_grad_enabled() else None

    def _choose(
        self,
        few: int,
        model: VAE,
        batch: Batch,
        noise: Noise,
        *,
        num_bounds: int = 1,
        elbo_share: float = 0.0,
        stop_qz: bool = False,
    ) -> Few:
        """All samples of M bounds, and J of each bound's once more, drawn by their shares of its gradient."""
        import torch

        from vaelab.divergences import resample
        from vaelab.runtime import ChosenNoise

        total = num_bounds * self.num_samples
        with torch.no_grad():
            draw = model.draw(batch.x, num_samples=total, noise=noise)
            log_w = _by_bound(draw.log_w, num_bounds)
            share = elbo_share / self.num_samples + (1 - elbo_share) * log_w.softmax(0)
            u = noise.uniform("resample", (len(batch.x), num_bounds * few))
            u = u.reshape(-1, num_bounds, few).transpose(0, 1).flatten(0, 1)  # as (M B, J)
            chosen = resample(share.flatten(1), u).mT.reshape(few, *share.shape[1:])
            rows = chosen * num_bounds + torch.arange(num_bounds, device=u.device)[:, None]
        # Up to torch 2.10 a weight that autocast has cast without gradient is taken from its cache with gradient too.
        torch.clear_autocast_cache()
        some = ChosenNoise(noise, total, rows.flatten(0, 1).mT)
        again = model.draw(batch.x, num_samples=num_bounds * few, noise=some, stop_qz=stop_qz)
        parts = weighed_parts(draw, num_bounds, elbo_share)
        return Few(parts, log_w, chosen, _by_bound(again.log_w, num_bounds))


@final
@dataclass(frozen=True)
class IWAE(ThroughFew):
    r"""The importance-weighted bound: maximise :math:`E \log \frac1K \sum_k w_k`, :math:`w_k = p(x, z_k) / q(z_k|x)`.

    K = 1 is the ELBO with a sampled KL. With M bounds of K samples each, averaged, it is MIWAE. With a share beta of
    the mean log weight added, :math:`\beta E \log w + (1 - \beta) \log \frac1K \sum_k w_k`, it is CIWAE.

    Args:
        num_samples: K.
        num_bounds: M.
        elbo_share: beta of CIWAE.
        warm_samples, warm_epochs, backward_samples: as in ``ThroughFew``: fewer samples at first, and a gradient that
            goes through few (in CIWAE drawn by :math:`\frac{\beta}{K} + (1 - \beta) \tilde w_k`).

    Raises:
        UsageError: as ``ThroughFew``.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, eq. 8, and section 3 on sampling one of
        the K for the backward pass. https://arxiv.org/abs/1509.00519
        Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better (MIWAE, CIWAE), section 5.
        https://arxiv.org/abs/1802.04537
    """

    word: ClassVar[str] = "iwae"
    num_bounds: int = positive(1, "bounds that are averaged (M of MIWAE)")
    elbo_share: float = option(0.0, "weight on the ELBO beside the bound (beta of CIWAE)", at_most=1)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """``bound``, and mean distortion and rate over the samples."""
        if (count := self._few()) is not None:
            few = self._choose(count, model, batch, noise, num_bounds=self.num_bounds, elbo_share=self.elbo_share)
            return {**few.parts, "bound": _with_gradient(few.parts["bound"], few.chosen_log_w.mean((0, 1)))}
        return weighed_parts(model.draw(batch.x, num_samples=self.num_bounds * self.num_samples, noise=noise),
                             self.num_bounds, self.elbo_share)  # fmt: skip


@final
@dataclass(frozen=True)
class PIWAE(ThroughFew):
    r"""Decoder by the IWAE bound of M K samples, encoder by the average of M bounds of K: each by what serves it.

    The more samples a bound has, the less of its gradient is signal for the encoder; the decoder only gains.

    Args:
        num_samples: K.
        num_bounds: M.
        warm_samples, warm_epochs, backward_samples: as in ``ThroughFew``: bounds of fewer samples at first, and as many
            of them; a gradient that goes through few of each bound's. The same J M serve both sides: the encoder by
            their plain mean, the decoder by that of each bound times :math:`\sum_k w_k` of it, normalised over the M.

    Raises:
        UsageError: as ``ThroughFew``, and for a prior that is made of the encoder: its parameters would stand on both
            sides.

    Reference:
        Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better, section 5.
        https://arxiv.org/abs/1802.04537
    """

    word: ClassVar[str] = "piwae"
    num_samples: int = positive(8, "importance samples of a bound (K)")
    num_bounds: int = positive(8, "bounds that are averaged for the encoder (M)")

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Encoder and decoder."""
        self.require_alike(model)
        return two_sides(model, self.word)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """``bound`` (of M K samples), ``averaged`` (of M bounds), distortion and rate."""
        if (count := self._few()) is not None:
            return self._parts_through_few(count, model, batch, noise)
        draw = model.draw(batch.x, num_samples=self.num_bounds * self.num_samples, noise=noise)
        parts = weighed_parts(draw, 1)
        return {**parts, "averaged": weighed_parts(draw, self.num_bounds)["bound"]}

    def _parts_through_few(self, count: int, model: VAE, batch: Batch, noise: Noise) -> Parts:
        from vaelab.divergences import log_mean_exp

        few = self._choose(count, model, batch, noise, num_bounds=self.num_bounds)
        of_each = few.chosen_log_w.mean(0)
        share = few.log_w.logsumexp(0).softmax(0)  # of each bound in that of all samples
        return {
            **few.parts,
            "bound": _with_gradient(log_mean_exp(few.log_w.flatten(0, 1)), (share * of_each).sum(0)),
            "averaged": _with_gradient(few.parts["bound"], of_each.mean(0)),
        }

    def shares(self, loss: Tensor, means: Mapping[str, Tensor]) -> tuple[Group, Loss]:
        """The encoder's is the averaged bound, the decoder's the loss."""
        return ("encoder", "decoder"), (-means["averaged"], loss)


@final
@dataclass(frozen=True)
class DReG(ThroughFew):
    r"""The IWAE bound, with a doubly reparameterised gradient for the encoder: unbiased, and with less variance.

    :math:`\nabla_\phi = E \sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial
    \phi}` with :math:`\tilde w` the normalised weights. Its signal-to-noise ratio grows with K, where IWAE's falls.

    Args:
        num_samples: K.
        warm_samples, warm_epochs, backward_samples: as in ``ThroughFew``: fewer samples at first, and a gradient that
            goes through few (the encoder's from :math:`\tilde w_j \frac{\partial \log w_j}{\partial z_j}`).

    Raises:
        UsageError: as ``ThroughFew``, and for a prior that is made of the encoder: its parameters would stand on both
            sides.

    Note:
        Unbiased for posteriors that are reparameterised; a Gumbel-softmax one passes its gradient straight through.

    Reference:
        Tucker et al. (2019), Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, eq. 8.
        https://arxiv.org/abs/1810.04152
    """

    word: ClassVar[str] = "dreg"

    def groups(self, model: VAE, networks: ModuleDict) -> dict[str, list[Parameter]]:
        """Encoder and decoder."""
        self.require_alike(model)
        return two_sides(model, self.word)

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """``bound``, distortion and rate; ``surrogate``, whose gradient is the encoder's."""
        if (count := self._few()) is not None:
            few = self._choose(count, model, batch, noise, stop_qz=True)
            bound = _with_gradient(few.parts["bound"], few.chosen_log_w.mean((0, 1)))
            weights = few.log_w.softmax(0).gather(0, few.chosen)
            return {**few.parts, "bound": bound, "surrogate": (weights * few.chosen_log_w).mean((0, 1))}
        draw = model.draw(batch.x, num_samples=self.num_samples, noise=noise, stop_qz=True)
        weights = draw.log_w.detach().softmax(0)
        return {**weighed_parts(draw, 1), "surrogate": (weights.square() * draw.log_w).sum(0)}

    def shares(self, loss: Tensor, means: Mapping[str, Tensor]) -> tuple[Group, Loss]:
        """The encoder's is the surrogate, the decoder's the loss."""
        return ("encoder", "decoder"), (-means["surrogate"], loss)


@final
@dataclass(frozen=True)
class STL(Objective):
    r"""Sticking the landing: the bound's gradient without the score :math:`\nabla_\phi \log q_\phi(z|x)`.

    The parameters of q are held constant in log q, so that the gradient flows through the samples alone. It is exactly
    zero, not only on average, where q is the true posterior.

    Args:
        num_samples: K.

    Note:
        The score has mean 0 only at K = 1. For more samples the gradient is biased (the normalised weights correlate
        with it): ``dreg`` is the unbiased estimate.

    Reference:
        Roeder, Wu & Duvenaud (2017), Sticking the Landing. https://arxiv.org/abs/1703.09194
        Tucker et al. (2019), section 3 (the bias). https://arxiv.org/abs/1810.04152
    """

    word: ClassVar[str] = "stl"
    num_samples: int = positive(1, "importance samples of a bound (K); above 1 the gradient is biased")

    def parts(self, model: VAE, networks: ModuleDict, batch: Batch, noise: Noise) -> Parts:
        """``bound``, distortion and rate."""
        return weighed_parts(model.draw(batch.x, num_samples=self.num_samples, noise=noise, stop_qz=True), 1)

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """Minus the bound."""
        return -means["bound"]


def _by_bound(samples: Tensor, num_bounds: int) -> Tensor:
    """(K M, B) as (K, M, B): sample k of bound m is row k M + m."""
    return samples.reshape(-1, num_bounds, samples.shape[1])


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value, with the gradient of another."""
    return value.detach() + surrogate - surrogate.detach()


def weighed_parts(draw: Draw, num_bounds: int, elbo_share: float = 0.0) -> Parts:
    """The bound of each example, averaged over M groups of its samples, and mean distortion and rate; each (B,).

    Raises:
        TypeError: if the posterior has no density, or costs something that no bound knows (a codebook).
    """
    from vaelab.divergences import log_mean_exp

    if cast("Posterior", draw.qz).penalty is not None:
        raise TypeError(
            f"no bound holds the penalty of its posterior {type(draw.qz).__name__}: --objective elbo adds it"
        )
    log_w = draw.log_w
    bound = log_mean_exp(_by_bound(log_w, num_bounds)).mean(0)
    # (The share may be a tensor, in a step that is traced: nothing here may ask for its value.)
    bound = elbo_share * log_w.mean(0) + (1 - elbo_share) * bound
    rate = (draw.require_log_qz("the rate") - draw.log_pz).mean(0)
    return {"bound": bound, "distortion": -draw.log_px.mean(0), "rate": rate}
