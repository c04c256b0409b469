"""``vaelab refit``: a prior fitted to codes is nearer to them than the old one, draws what it scores, and is a run like any."""

import copy
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, kl_divergence

from oracle import dataset as dataset_of
from oracle import linear_vae, sample_images
from vaelab import figures, specs
from vaelab.cli import main
from vaelab.config import Run, override
from vaelab.distribution import NoDensityError
from vaelab.drawing import pictures
from vaelab.drawing.scene import scene_of
from vaelab.errors import UsageError
from vaelab.evaluate.undefined import why_no_annealing
from vaelab.models import VAE
from vaelab.posteriors import NormalPosterior
from vaelab.priors import MixturePrior, TwoStage
from vaelab.recipes import recipe
from vaelab.refit import Fitting, _fit, _score, _train, draw_codes, refit
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import load_model
from vaelab.runtime import RowNoise, StepNoise
from vaelab.training.trainer import build_model

SMALL = {"mixture": specs.Mixture(3, "full"), "flow": specs.FlowPrior(num_transforms=2, hidden_dims=(16,)),
         "two-stage": specs.TwoStage((64, 64))}  # fmt: skip
FLAGS = {"mixture": ["--components", "5"], "flow": ["--transforms", "2", "--hidden-dims", "16", "--epochs", "8"],
         "two-stage": ["--hidden-dims", "32", "--epochs", "25", "--batch-size", "64", "--learning-rate", "0.005"]}  # fmt: skip
QUICK = Fitting(epochs=60, learning_rate=5e-3, batch_size=64)
RUN = Run(recipe="oracle", posterior=specs.DiagonalNormal(2))


@dataclasses.dataclass(frozen=True)
class Head:
    latent_dim: int
    space: str = "real"


def mixture_of(components: int, dim: int, covariance: str = "full"):
    """A mixture prior with weights, means and covariances that are nothing in particular, and torch's own of the same."""
    torch.manual_seed(0)
    part = MixturePrior(specs.Mixture(components, covariance), Head(dim), (1, 8, 8))
    weights = torch.rand(components) + 0.1
    spread = (
        torch.randn(components, dim, dim) if covariance == "full" else torch.diag_embed(torch.rand(components, dim))
    )
    root = torch.linalg.cholesky(spread @ spread.mT + 0.2 * torch.eye(dim))
    loc = 2 * torch.randn(components, dim)
    part.start_at(weights / weights.sum(), loc, root)
    return part, MixtureSameFamily(Categorical(weights), MultivariateNormal(loc, scale_tril=root))


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_mixture_is_torchs_mixture_of_multivariate_normals(covariance):
    part, torchs = mixture_of(4, 3, covariance)
    pz, z = part(), 3 * torch.randn(5, 7, 3)
    torch.testing.assert_close(pz.log_prob(z), torchs.log_prob(z), atol=1e-4, rtol=1e-5)
    assert (part.lower is None) == (covariance == "diagonal")


@pytest.mark.parametrize("draw", ["sample", "rsample_from"])
def test_a_full_mixture_draws_what_it_scores(draw):
    """The mean of log p over its draws is minus the entropy that torch's mixture has over draws of its own."""
    part, torchs = mixture_of(3, 2)
    pz, n = part(), 20_000
    with torch.no_grad():
        z = pz.sample((n,)) if draw == "sample" else pz.rsample_from(StepNoise(0, 0), n)
        ours, theirs = torchs.log_prob(z), torchs.log_prob(torchs.sample((n,)))
        assert abs(ours.mean() - theirs.mean()) < 3.5 * math.hypot(ours.std(), theirs.std()) / math.sqrt(n)
        covariance = torch.cov(z.mT)
        assert torch.allclose(covariance, torch.cov(torchs.sample((n,)).mT), atol=0.25), "correlations too"
        assert abs(covariance[0, 1]) > 0.3


def test_every_parameter_of_a_full_mixture_has_a_gradient():
    part, _ = mixture_of(3, 3)
    part().log_prob(torch.randn(50, 3)).mean().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert torch.equal(part.lower.grad, part.lower.grad.tril(-1)), "what is not below the diagonal does not count"


def test_full_mixtures_score_in_fp32_under_autocast():
    part, _ = mixture_of(3, 4)
    z = torch.randn(20, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under = part().log_prob(z)
    assert torch.equal(under, part().log_prob(z))


def linear_second_stage(dim: int = 2) -> tuple[TwoStage, MultivariateNormal]:
    """A second stage with linear networks and its exact p(z), a normal: its encoder is the exact posterior, widened."""
    torch.manual_seed(0)
    part = TwoStage(specs.TwoStage(()), Head(dim), (1, 8, 8))
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    part.start_at(loc, scale)
    lengths, gamma = torch.tensor([1.0, 0.4]), 0.3
    with torch.no_grad():
        part.log_gamma.fill_(math.log(gamma))
        part.decoder.last.weight.copy_(torch.diag(lengths))
        part.decoder.last.bias.zero_()
        m = lengths**2 + gamma**2
        part.encoder.last.weight.copy_(torch.cat([torch.diag(lengths / m), torch.zeros(dim, dim)]))
        part.encoder.last.bias.copy_(torch.cat([torch.zeros(dim), 0.5 * torch.log(gamma**2 / m) + 0.4]))
    return part, MultivariateNormal(loc, torch.diag(scale**2 * (lengths**2 + gamma**2)))


def test_the_second_stages_bounds_are_bounds_on_its_exact_density():
    """ELBO < importance-weighted bound <= log p(z), and the gap of the first is the divergence of its encoder."""
    part, exact = linear_second_stage()
    z = exact.sample((2000,))
    with torch.no_grad():
        log_p = exact.log_prob(z)
        elbo, bound = part.elbo(z, RowNoise(1)), part.log_bound(z, 64, RowNoise(2))
    gap = log_p - elbo
    posterior, width = (
        NormalPosterior(torch.zeros(2), torch.zeros(2)),
        NormalPosterior(torch.zeros(2), torch.full((2,), 0.4)),
    )
    expected = kl_divergence(width.base_dist, posterior.base_dist).sum()
    assert abs(gap.mean() - expected) < 3.5 * gap.std() / math.sqrt(len(z))
    assert elbo.mean() + 0.1 < bound.mean() <= log_p.mean() + 3 * (log_p - bound).std() / math.sqrt(len(z))
    assert (log_p - bound).mean() < 0.02


def test_the_second_stage_draws_from_its_exact_density_and_has_none_to_ask_for():
    part, exact = linear_second_stage()
    pz = part()
    torch.manual_seed(1)
    for z in (pz.sample((20_000,)), pz.rsample_from(StepNoise(0, 0), 20_000).detach()):
        torch.testing.assert_close(z.mean(0), exact.mean, atol=0.1, rtol=0)
        torch.testing.assert_close(z.std(0), exact.stddev, rtol=0.03, atol=0)
    for kind in (NotImplementedError, TypeError):
        with pytest.raises(kind, match="two-stage can be sampled and has no density"):
            pz.log_prob(torch.zeros(2))
    assert issubclass(NoDensityError, TypeError)


# --- the fit --------------------------------------------------------------------------------------------------------


def ring(count: int, seed: int = 0) -> tuple[VAE, torch.Tensor]:
    """A linear VAE whose images are of latents on a ring, where a standard normal hardly has any."""
    model = linear_vae(2, sigma=0.05)
    angle = 2 * math.pi * torch.rand(count, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model, model.likelihood(3 * torch.stack([angle.cos(), angle.sin()], 1)).mean


@pytest.mark.parametrize("prior", SMALL.values(), ids=SMALL)
def test_a_fitted_prior_beats_the_old_one_on_codes_that_it_has_not_seen(prior):
    model, x = ring(900)
    data = dataset_of(x[:600])
    data = dataclasses.replace(data, validation=dataset_of(x[600:]).train)
    before = copy.deepcopy(model.state_dict())
    found = refit(RUN, model, data, prior, QUICK)
    assert found.gain.value > 10 * found.gain.stderr > 0
    assert found.gain.value == pytest.approx(found.after.value - found.before.value, abs=1e-6)
    assert found.before.value == pytest.approx(-0.5 * 9 - math.log(2 * math.pi), abs=0.2), "log N(z; 0, I) at radius 3"
    assert found.run.prior == prior
    assert found.after.n == 300
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is untouched"
    kept = {name: value for name, value in found.model.state_dict().items() if not name.startswith("prior_part.")}
    assert all(torch.equal(value, before[name]) for name, value in kept.items()), "and so are encoder and decoder"
    radius = found.model.prior().sample((500,)).norm(dim=1)
    of_a_normal = (3 / math.sqrt(2) * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))).norm(dim=1)
    # Better than a normal of the codes' covariance, which is what a second stage that encodes nothing draws.
    assert (radius - 3).abs().median() < 0.6 * (of_a_normal - 3).abs().median()
    assert found.after.value > -0.5 * (2 * math.log(2 * math.pi * math.e) + 2 * math.log(4.5)) + 0.5


def test_a_fit_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone():
    model, x = ring(200)
    state = torch.get_rng_state()
    first, again, other = (
        refit(
            RUN, model, dataset_of(x), SMALL["flow"], dataclasses.replace(QUICK, epochs=2, seed=seed)
        ).model.state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_a_mixture_of_one_full_normal_is_the_codes_mean_and_covariance():
    """The maximum of the likelihood in closed form."""
    model, x = ring(300)
    data = dataset_of(x)
    pz = refit(RUN, model, data, specs.Mixture(1, "full")).model.prior()
    z = draw_codes(model, data, "train", Fitting().seed)
    expected = MultivariateNormal(z.mean(0), torch.cov(z.mT, correction=0))
    torch.testing.assert_close(pz.log_prob(z), expected.log_prob(z), atol=1e-3, rtol=1e-4)


def test_a_training_that_gets_no_better_stops_and_keeps_its_best_weights():
    """Where the old prior is right already, nothing is gained, and a patience of 2 ends it early."""
    model = linear_vae(2)
    data = dataset_of(sample_images(model, 400))
    how = Fitting(epochs=60, patience=2, learning_rate=0.05)
    found = refit(RUN, model, data, SMALL["flow"], how)
    assert found.epochs < 60
    assert abs(found.gain.value) < 0.5


def test_scales_of_codes_are_no_matter():
    """Codes a hundred times as large cost log 100 nats more in each dimension, under each kind of prior."""
    model, x = ring(400)
    large = copy.deepcopy(model)
    head = large.posterior_head.loc_and_log_scale
    with torch.no_grad():
        head.weight[:2] *= 100
        head.bias[:2] *= 100
        head.bias[2:] += math.log(100)
    for prior in SMALL.values():
        small, big = (
            refit(RUN, m, dataset_of(x), prior, dataclasses.replace(QUICK, epochs=3)).after for m in (model, large)
        )
        assert big.value == pytest.approx(small.value - 2 * math.log(100), abs=0.05), prior.word


def test_autoencoders_have_codes_too():
    """A deterministic encoder: no density of z given x is needed."""
    torch.manual_seed(0)
    vae = VAE(specs.MLPEncoder((16,)), specs.Deterministic(2), specs.StandardNormal(), specs.MLPDecoder((16,)),
              specs.Bernoulli(), (1, 8, 8))  # fmt: skip
    x = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    run = Run(recipe="oracle", posterior=specs.Deterministic(2))
    found = refit(run, vae, dataset_of(x), SMALL["mixture"])
    assert found.gain.value > 1, "untrained codes lie close together"


def test_latents_that_are_no_real_vectors_are_refused():
    model = VAE(specs.MLPEncoder((16,)), specs.GumbelSoftmax(2, 3), specs.UniformCategories(), specs.MLPDecoder((16,)),
                specs.Bernoulli(), (1, 8, 8))  # fmt: skip
    run = Run(recipe="oracle", posterior=specs.GumbelSoftmax(2, 3), prior=specs.UniformCategories())
    with pytest.raises(UsageError, match="gumbel-softmax are one-hot vectors"):
        refit(run, model, dataset_of(torch.rand(50, 1, 8, 8)), SMALL["mixture"])


def test_a_prior_that_is_not_fitted_to_codes_is_refused():
    model, x = ring(50)
    with pytest.raises(UsageError, match="vamp is not fitted to codes"):
        refit(RUN, model, dataset_of(x), specs.VampPrior(3))
    with pytest.raises(UsageError, match="as many as there are codes"):
        refit(RUN, model, dataset_of(x), specs.Mixture(51))
    with pytest.raises(UsageError, match="two codes at least"):
        refit(RUN, model, dataset_of(x[:1]), specs.Mixture(1))


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mlp"
    arguments = ["--data", "digits", "--epochs", "2", "--beta", "0.3", "--latent-dim", "6", "--threads", "1"]
    assert main(["train", "mlp", *arguments, "--precision", "fp32", "--compile", "off", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def refitted(trained):
    folders = {}
    for prior, flags in FLAGS.items():
        assert main(["refit", str(trained), "--prior", prior, *flags, "--threads", "1"]) == 0
        folders[prior] = trained.with_name(f"mlp-{prior}")
    return folders


@pytest.mark.parametrize("prior", FLAGS)
def test_the_new_folder_is_a_whole_run_with_another_prior(trained, refitted, prior, capsys):
    source, folder = RunFolder.open(trained), RunFolder.open(refitted[prior])
    assert folder.run.prior.word == prior
    before = override(folder.run, prior="standard-normal")
    assert dataclasses.replace(before, bf16_gap=source.run.bf16_gap) == source.run
    assert folder.best_epoch() == source.best_epoch()
    assert [{**r, "before_refit": True} for r in source.history()] == folder.history()
    assert (folder.path / "samples.png").exists(), "the pictures of the recipe are drawn anew"
    old, new = source.load_best(), folder.load_best()
    assert all(torch.equal(new[name], value) for name, value in old.items() if not name.startswith("prior_part."))
    about = folder.config()["refit"]
    assert about["from"] == "mlp"
    assert about["gain"]["value"] > 3 * about["gain"]["stderr"]
    model = load_model(folder.path)
    assert folder.config()["resolved"]["parameters"] == model.num_parameters()
    assert main(["sample", str(folder.path), "--num", "4"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("prior", FLAGS)
def test_a_refitted_run_is_evaluated_and_what_has_no_density_says_so(refitted, prior, tmp_path, capsys):
    folder = shutil.copytree(refitted[prior], tmp_path / "run")
    only = ["--only", "elbo", "latents", "reconstruction"]
    assert main(["evaluate", str(folder), *only, "--protocol", "threshold", "--threads", "1"]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())["splits"]["test"]["threshold"]["metrics"]
    assert {"distortion", "mutual_information", "two_sample_accuracy", "psnr"} <= metrics.keys()
    has_density = prior != "two-stage"
    assert ("rate" in metrics) == ("aggregate_kl" in metrics) == ("negative_elbo" in metrics) == has_density
    capsys.readouterr()
    code = main(["evaluate", str(folder), "--only", "nll", "--protocol", "threshold", "--num-samples", "3", "--rows", "3",
                 "--threads", "1"])  # fmt: skip
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if has_density:
        assert code == 0
    else:
        assert "has no density" in said.out + said.err


def test_a_better_prior_lowers_the_rate_by_what_the_command_promised(trained, refitted, tmp_path):
    """The rate on the validation images falls by the gain on their codes, as q(z|x) stayed the same."""
    rates = {}
    for folder in (trained, refitted["mixture"]):
        copied = shutil.copytree(folder, tmp_path / folder.name)
        arguments = ["--only", "elbo", "--split", "validation", "--protocol", "grey", "--threads", "1"]
        assert main(["evaluate", str(copied), *arguments]) == 0
        found = json.loads((copied / "metrics.json").read_text())["splits"]["validation"]["grey"]["metrics"]
        rates[folder.name] = found["rate"]
    gain = RunFolder.open(refitted["mixture"]).config()["refit"]["gain"]
    fall = rates["mlp"]["value"] - rates["mlp-mixture"]["value"]
    assert abs(fall - gain["value"]) < 3 * math.hypot(*(r["stderr"] for r in (*rates.values(), gain)))


def test_a_report_says_how_the_prior_came_about(refitted, tmp_path, capsys):
    folder = shutil.copytree(refitted["two-stage"], tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "vaelab refit mlp --prior two-stage --hidden-dims 32 --epochs 25 --batch-size 64" in page
    before = "All this is under the prior that the run was trained with"
    assert f"augmentation included. {before}" in page
    assert f"down and left is better. {before}" in page
    capsys.readouterr()


def test_a_picture_of_the_training_says_under_which_prior_it_was(trained, refitted):
    for path, is_refitted in ((trained, False), (refitted["mixture"], True)):
        scene = scene_of(path)
        for draw in (pictures.loss_curve, pictures.training_history, pictures.rate_distortion):
            figure = draw(scene)
            words = [text.get_text() for text in figure.findobj(Text)]
            assert any("the curves are of the prior that it was trained with" in word for word in words) == is_refitted
    histories = {path.name: RunFolder.open(path).history() for path in (trained, refitted["mixture"])}
    models = {path.name: load_model(path) for path in (trained, refitted["mixture"])}
    compared = figures.comparison([("digits", histories)], models, side=2)
    assert [line.get_label() for line in compared.axes[0].get_lines()] == ["mlp", "mlp-mixture (before the refit)"]
    assert compared.subfigs[1].get_suptitle() == "Samples: each its own z, as the prior differs"


@pytest.mark.parametrize(("prior", "said"), [("mixture", None), ("two-stage", "has no density")])
def test_chains_from_a_fitted_prior_ask_no_density_of_the_encoder(prior, said):
    run = override(recipe("mlp"), posterior="deterministic", objective="rae", latent_dim=3)
    model = VAE(run.encoder, run.posterior, SMALL[prior], run.decoder, specs.Bernoulli(), (1, 8, 8))
    why = why_no_annealing(model, "prior")
    assert (why is None) if said is None else (said in why)
    assert "has no density" in why_no_annealing(model, "encoder")


def complaint(capsys) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("vaelab: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prior", "flow", "--components", "3"], "--components belongs to --prior mixture"),
        (["--prior", "mixture", "--epochs", "3"], "--epochs belongs to --prior flow and --prior two-stage"),
        (["--components", "0"], "--components 0: must be a number greater than 0"),
        (["--components", "2000"], "give 1 to 1437"),
        (["--prior", "vamp"], "vamp"),
    ],
)
def test_wrong_wishes_are_refused_in_one_line(trained, tmp_path, capsys, flags, said):
    assert main(["refit", str(trained), *flags, "--out", str(tmp_path / "new")]) == 2
    assert said in complaint(capsys)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_taken_is_left_alone_and_a_refitted_run_is_not_gone_on_with(trained, refitted, capsys):
    weights = (refitted["mixture"] / "best_model.pth").read_bytes()
    capsys.readouterr()
    assert main(["refit", str(trained)]) == 2
    assert "holds a run already" in complaint(capsys)
    assert (refitted["mixture"] / "best_model.pth").read_bytes() == weights
    again = ["train", "mlp", "--data", "digits", "--prior", "mixture", "--epochs", "3"]
    assert main([*again, "--out", str(refitted["mixture"]), "--resume"]) == 2
    assert "prior was fitted after its training" in complaint(capsys)


def test_a_prior_can_be_fitted_again(refitted, tmp_path, capsys):
    """From one without a density too: its bound stands for it."""
    assert main(["refit", str(refitted["two-stage"]), "--components", "2", "--out", str(tmp_path / "b")]) == 0
    before = RunFolder.open(tmp_path / "b").config()["refit"]["before"]
    assert before["prior"] == "two-stage"
    assert "lower bound" in before["protocol"]
    assert np.isfinite(before["value"])
    capsys.readouterr()


def test_codes_that_end_a_training_are_not_trained_on_and_steps_have_orders_and_noise_of_their_own():
    part, trained, held, noise = nn.Linear(1, 1, bias=False), [], [], []

    def bound(z, n):
        (trained if torch.is_grad_enabled() else held).append(z[:, 0].tolist())
        if torch.is_grad_enabled():
            noise.append(float(n.normal("z", (1,))))
        return part(z)[:, 0]

    _train(part, bound, torch.arange(40.0)[:, None], Fitting(epochs=2, batch_size=9))
    assert [len(rows) for rows in (held[0], *trained)] == [4, *[9] * 8]
    first, second = (list(itertools.chain(*trained[i : i + 4])) for i in (0, 4))
    assert sorted(held[0] + first) == list(range(40))
    assert first != second
    assert len(set(noise)) == 8


def test_scales_of_a_diagonal_mixture_are_those_of_the_clusters():
    torch.manual_seed(0)
    codes = torch.cat([0.5 * torch.randn(300, 2) - 5, 0.5 * torch.randn(300, 2) + 5])
    run = override(recipe("mlp"), data="digits", prior=specs.Mixture(2), latent_dim=2, encoder_hidden_dims=(8,))
    part = build_model(run, (1, 8, 8)).prior_part
    _fit(part, codes, Fitting())
    torch.testing.assert_close(part.log_scale.exp(), torch.full((2, 2), 0.5), rtol=0.15, atol=0)


def test_a_prior_made_of_posteriors_is_scored_as_in_evaluation():
    """Dropout and batch norm of the encoder that a VampPrior's pseudo-inputs go through."""
    model = build_model(override(recipe("conv-beta"), data="digits", prior=specs.VampPrior(5)), (1, 8, 8))
    codes = torch.randn(6, 32)
    values = [_score(model.train(mode), codes)[0] for mode in (False, True)]
    np.testing.assert_array_equal(*values)
    assert model.training
