"""Importance sampling against a model whose log-likelihood is known exactly, per example; and proof that it would show."""

import contextlib
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from oracle import bend, dataset, exact_log_px, linear_vae, sample_images
from vaelab import evaluate as measure
from vaelab import specs
from vaelab.config import override
from vaelab.data.datasets import EVALUATION_SEED
from vaelab.divergences import log_mean_exp
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import importance
from vaelab.evaluate.importance import effective_sample_size, iwae_bounds, nll, sample_counts
from vaelab.evaluate.pieces import in_pieces
from vaelab.evaluate.undefined import why_no_bound
from vaelab.models import VAE, Draw
from vaelab.recipes import recipe
from vaelab.runtime import RowNoise, SampleNoise
from vaelab.train import fit
from vaelab.training.compiling import can_compile

N, S = 400, 100
ENCODERS = {"exact": (0.0, 0.0), "wide": (0.4, 0.0), "narrow": (-0.15, 0.0), "shifted": (0.1, 0.1)}


def rows(model, data, **options):
    return importance.join(importance.importance_rows(model, data, **options))


def errors(model, x, **options):
    """Per example: the estimate's error in nats, the ratio of likelihoods, and the weights' relative variance."""
    found = rows(model, dataset(x), num_samples=S, **options)
    error = found[f"k={S}"] - exact_log_px(model, x).numpy()
    return error, np.exp(error), S / found["ess"] - 1


def assert_right(error, ratio, variance):
    n = len(error)
    assert abs(error.mean()) <= 3 * error.std(ddof=1) / n**0.5 + variance.mean() / (2 * S) + 1e-4
    assert abs(ratio.mean() - 1) <= 3 * ratio.std(ddof=1) / n**0.5 + 1e-4


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("latent_dim", [1, 2, 8])
def test_the_estimate_is_right_per_example(latent_dim, encoder):
    model = bend(linear_vae(latent_dim), *ENCODERS[encoder])
    assert_right(*errors(model, sample_images(model, N)))


@pytest.mark.parametrize("mistake", ["log k dropped", "kl twice", "mean in place of a sample"])
def test_that_comparison_notices(mistake, monkeypatch):
    model = bend(linear_vae(2), *ENCODERS["wide"])
    x = sample_images(model, N)
    if mistake == "log k dropped":
        monkeypatch.setattr(importance, "log_mean_exp", lambda w: torch.logsumexp(w, 0))
    elif mistake == "kl twice":
        monkeypatch.setattr(Draw, "log_w", property(lambda d: d.log_px + 2 * (d.log_pz - d.log_qz)))
    else:
        drawn = RowNoise.drawn
        monkeypatch.setattr(RowNoise, "drawn", lambda self, *asked: 0 * drawn(self, *asked))
    with pytest.raises(AssertionError):
        assert_right(*errors(model, x))


def test_the_interval_covers_as_often_as_it_says():
    """Over fresh data sets from the known model, the 95 % interval holds the true mean of -log p(x)."""
    model = linear_vae(2)
    truth = -exact_log_px(model, sample_images(model, 50_000, seed=99)).mean().item()
    inside = 0
    for seed in range(200):
        estimate = nll(model, dataset(sample_images(model, 100, seed=seed)), num_samples=1)["nll_1"]
        inside += abs(estimate.value - truth) < 1.96 * estimate.stderr
    assert 0.91 < inside / 200 < 0.98


def test_bounds_fall_with_k_whatever_the_draws():
    log_w = 5 * torch.randn(5000, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds = iwae_bounds(log_w)
    assert list(bounds) == [1, 10, 100, 1000, 5000]
    values = torch.stack(list(bounds.values()))
    assert (values.diff(dim=0) >= 0).all(), "for every example, not on average alone"
    torch.testing.assert_close(bounds[1], log_w.mean(0))
    torch.testing.assert_close(bounds[5000], log_mean_exp(log_w))
    by_hand = log_w[:10].logsumexp(0) - math.log(10)
    torch.testing.assert_close(iwae_bounds(log_w[:10])[10], by_hand)


@pytest.mark.parametrize(("total", "counts"), [(1, (1,)), (10, (1, 10)), (500, (1, 10, 100, 500)), (77, (1, 77))])
def test_counts_are_nested(total, counts):
    assert sample_counts(total) == counts


def test_effective_sample_size_of_known_weights():
    log_w = torch.log(torch.tensor([[1.0, 1.0], [1.0, 1e-30], [1.0, 1e-30], [1.0, 1e-30]]))
    torch.testing.assert_close(effective_sample_size(log_w), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(effective_sample_size(log_w + 1e4), torch.tensor([4.0, 1.0]), atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def trained(digits):
    return fit(override(recipe("mlp"), epochs=2), digits)


def test_memory_workers_and_resuming_change_nothing(trained, digits):
    whole = rows(trained, digits, num_samples=200, rows=23)
    small = 60 * importance.decode_bytes(trained)
    for options in ({"memory": small}, {"memory": 2 * small, "workers": 2}, {"memory": 50 * small}):
        other = rows(trained, digits, num_samples=200, rows=23, **options)
        for name, values in whole.items():
            tolerance = 1e-3 if name == "ess" else 1e-5
            np.testing.assert_allclose(other[name], values, rtol=tolerance, err_msg=f"{name} {options}")
    rest = rows(trained, digits, num_samples=200, rows=23, first_row=9)
    np.testing.assert_allclose(rest["k=200"], whole["k=200"][9:], rtol=1e-5)
    assert torch.get_num_threads() == 1


def test_a_caller_that_stops_early_waits_for_no_piece_that_is_not_begun(trained):
    begun, before = [], torch.get_num_threads()

    def score(piece: slice) -> dict[str, np.ndarray]:
        begun.append(piece.start)
        time.sleep(0.01)
        return {"place": np.array([float(piece.start)])}

    found = in_pieces(trained.train(), [slice(i, i + 1) for i in range(2000)], score, workers=2)
    assert [next(found)[1]["place"].item() for _ in range(5)] == [0, 1, 2, 3, 4]
    found.close()
    count = len(begun)
    assert count < 1000
    time.sleep(0.1)
    assert (len(begun), torch.get_num_threads(), trained.training) == (count, before, True)


COMPILED = """
import numpy as np
import vaelab as v
from vaelab.evaluate.importance import importance_rows
from vaelab.evaluate.pieces import join

digits = v.load("digits")
model = v.fit(v.override(v.recipes.mlp(), epochs=1), digits)
for bf16 in (False, True):
    options = {"num_samples": 200, "rows": 6, "bf16": bf16}
    plain = join(importance_rows(model, digits, **options))
    fused = join(importance_rows(model, digits, **options, workers=2, compiling=True))
    for name, values in plain.items():
        # In bf16 what is fused skips roundings that the plain way makes.
        tolerance = 1e-4 if not bf16 else 1e-3 if name.startswith("k=") else 0.2
        np.testing.assert_allclose(fused[name], values, rtol=tolerance, err_msg=f"{name} {bf16}")
    assert any((fused[name] != plain[name]).any() for name in plain), "nothing was compiled"
assert "log_px" not in vars(model), "the model is not as it was"
"""


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler or no headers of Python here")
def test_a_compiled_likelihood_changes_rounding_alone():
    """In a process of its own: the checks of types that tests run under cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


UNCOMPILED = (
    COMPILED.replace("assert any(", "assert not any(")
    + """
assert sum("cannot be compiled here" in line for line in said) == 2, "once for each precision"
"""
)


def test_a_compiler_that_fails_costs_a_line_and_no_number(tmp_path):
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    listen = "import logging; said = []; logging.getLogger('vaelab').addFilter(lambda r: said.append(r.getMessage()))\n"
    done = subprocess.run([sys.executable, "-c", listen + UNCOMPILED], capture_output=True, text=True,
                          env={**os.environ, **broken})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("compiling", [False, True])
def test_threads_beside_one_that_compiles_share_no_casts(compiling, trained, digits, monkeypatch):
    """Casts that autocast keeps are behind a lock, at which two such threads can wait for each other for ever."""
    keeps = []
    plain = trained.log_px

    def log_px(*given):
        keeps.append(torch.is_autocast_cache_enabled())
        return plain(*given)

    monkeypatch.setattr(importance, "compiled_log_px", lambda model: contextlib.nullcontext())
    monkeypatch.setitem(vars(trained), "log_px", log_px)
    rows(trained, digits, num_samples=20, rows=4, bf16=True, compiling=compiling)
    assert keeps
    assert all(kept is not compiling for kept in keeps)


def test_windows_on_noise_are_the_noise():
    noise = RowNoise(EVALUATION_SEED, 3, block=1)
    whole, windows = noise.normal("z", (4, 10, 2)), SampleNoise(noise, 10)
    seen = []
    for windows.first in (0, 4, 8):
        seen.append(windows.normal("z", (4, min(4, 10 - windows.first), 2)))
    assert torch.equal(torch.cat(seen, 1), whole)


def test_memory_is_counted_on_the_networks_own_activations(trained):
    # 20-512-784 with a rectifier and a reshaping: 512 + 512 + 784 + 784, and two more images for their score
    assert importance.decode_bytes(trained) == 4 * (512 + 512 + 784 + 784 + 2 * 784)


def test_what_is_reported(trained, digits):
    found = nll(trained, digits, num_samples=100, rows=20)
    assert list(found) == ["nll_1", "nll_10", "nll_100", "ess"]
    assert found["nll_1"].value >= found["nll_10"].value >= found["nll_100"].value
    assert found["nll_100"].n == 20
    words = "digits test (first 20 images), grey pixels, IWAE k=100, cross-entropy: not a likelihood"
    assert found["nll_100"].protocol == words
    assert 1 <= found["ess"].value <= 100
    elbo = measure.evaluate(trained, recipe("mlp"), digits, num_samples=100)["negative_elbo"]
    full = nll(trained, digits, num_samples=100)
    assert full["nll_1"].value == pytest.approx(elbo.value, abs=0.5), "k = 1 is the sampled ELBO"


def test_bf16_products_stay_near(trained, digits):
    full = nll(trained, digits, num_samples=100, rows=12)["nll_100"].value
    half = nll(trained, digits, num_samples=100, rows=12, bf16=True)["nll_100"].value
    assert half != full
    assert half == pytest.approx(full, abs=0.1)


def test_bad_input_is_one_line(trained, digits):
    with pytest.raises(UsageError, match="--num-samples 0"):
        nll(trained, digits, num_samples=0)
    with pytest.raises(UsageError, match="--memory 1: one image alone takes 2 MiB to decode"):
        nll(trained, digits, memory=2**20, workers=2**21 // importance.decode_bytes(trained))


def test_a_posterior_that_yields_nan_is_named(digits):
    model = fit(override(recipe("mlp"), epochs=1), digits)
    with torch.no_grad():
        model.posterior_head.loc_and_log_scale.bias[0] = float("nan")
    with pytest.raises(FailureError, match="an importance weight of image 0 of the test split is not finite"):
        nll(model, digits, num_samples=10)


def test_one_image_has_no_standard_error(trained, digits):
    found = nll(trained, digits, num_samples=10, rows=1)["nll_10"]
    assert math.isnan(found.stderr)
    assert found.to_json()["stderr"] is None


def test_a_model_in_training_is_scored_as_any_other_and_left_as_it_was(digits):
    parts = (specs.ConvEncoder((4,), dropout=0.5), specs.DiagonalNormal(2), specs.StandardNormal(),
             specs.ConvDecoder((4,), batch_norm=True), specs.Bernoulli())  # fmt: skip
    model = VAE(*parts, digits.shape).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert why_no_bound(model) is None
    nll(model, digits, num_samples=2, rows=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
