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
ONE = override(RUN, epochs=1)
MARKS = {1: 140.0, 3: 125.0}  # nats per validation image, grey cross-entropy + KL, by the epochs of 784-400-20


def negative_elbo(mnist, run=ONE) -> float:
    model = fit(run, mnist)
    return evaluate(model, RUN, mnist, "validation")["negative_elbo"].value


@pytest.mark.parametrize("epochs", MARKS)
def test_training_reaches_the_mark(mnist, epochs):
    assert 95 < negative_elbo(mnist, override(RUN, epochs=epochs)) < MARKS[epochs]


def test_not_without_the_kl(mnist):
    assert negative_elbo(mnist, override(ONE, beta=0.0)) > MARKS[1]


def test_not_without_noise(mnist, monkeypatch):
    original = StepNoise.normal
    monkeypatch.setattr(StepNoise, "normal", lambda self, stream, shape: 0 * original(self, stream, shape))
    assert negative_elbo(mnist) > MARKS[1]


def test_not_with_a_frozen_decoder(mnist, monkeypatch):
    original = VAE.__init__

    def frozen(self, *arguments, **options):
        original(self, *arguments, **options)
        self.decoder.requires_grad_(False)

    def groups(self, model, networks):
        return {"model": [p for p in model.parameters() if p.requires_grad]}

    monkeypatch.setattr(VAE, "__init__", frozen)
    monkeypatch.setattr(type(RUN.objective), "groups", groups)
    assert negative_elbo(mnist) > MARKS[1]


def test_not_with_pixels_shifted_against_their_targets(mnist, monkeypatch):
    original = VAE.posterior

    def shifted(self, x, y=None):
        return original(self, torch.roll(x, 2, dims=-1) if self.training else x, y)

    monkeypatch.setattr(VAE, "posterior", shifted)
    assert negative_elbo(mnist) > MARKS[1]
