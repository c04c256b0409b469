"""A short run on real MNIST reaches what it should, and would not if something essential were broken."""

import pytest
import torch

from vaelab.config import override
from vaelab.evaluate import evaluate
from vaelab.models import VAE
from vaelab.recipes import recipe
from vaelab.runtime import StepNoise
from vaelab.train import fit

pytestmark = pytest.mark.mnist
RUN = override(recipe("mlp"), epochs=3, encoder_hidden_dims=(400,), decoder_hidden_dims=(400,))
MARK = 125.0  # nats per validation image, grey cross-entropy + KL, after three epochs of 784-400-20


def three_epochs(mnist, run=RUN) -> float:
    model = fit(run, mnist)
    return evaluate(model, RUN, mnist, "validation")["negative_elbo"].value


def test_three_epochs_reach_the_mark(mnist):
    assert 95 < three_epochs(mnist) < MARK


def test_not_without_the_kl(mnist):
    assert three_epochs(mnist, override(RUN, beta=0.0)) > MARK


def test_not_without_noise(mnist, monkeypatch):
    original = StepNoise.normal
    monkeypatch.setattr(StepNoise, "normal", lambda self, stream, shape: 0 * original(self, stream, shape))
    assert three_epochs(mnist) > MARK


def test_not_with_a_frozen_decoder(mnist, monkeypatch):
    original = VAE.__init__

    def frozen(self, *arguments, **options):
        original(self, *arguments, **options)
        self.decoder.requires_grad_(False)

    def groups(self, model, networks):
        return {"model": [p for p in model.parameters() if p.requires_grad]}

    monkeypatch.setattr(VAE, "__init__", frozen)
    monkeypatch.setattr(type(RUN.objective), "groups", groups)
    assert three_epochs(mnist) > MARK


def test_not_with_pixels_shifted_against_their_targets(mnist, monkeypatch):
    original = VAE.posterior

    def shifted(self, x, y=None):
        return original(self, torch.roll(x, 2, dims=-1) if self.training else x, y)

    monkeypatch.setattr(VAE, "posterior", shifted)
    assert three_epochs(mnist) > MARK
