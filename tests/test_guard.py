"""A likelihood is refused on data that it is none of, in training and in evaluation; numbers say what they are of."""

import math

import pytest
import torch

from vaelab import specs
from vaelab.config import override
from vaelab.data import Dataset, Split, load
from vaelab.data.guard import require_fit
from vaelab.diagnose import diagnose, examine
from vaelab.errors import UsageError
from vaelab.evaluate import evaluate
from vaelab.evaluate.importance import nll
from vaelab.recipes import recipe
from vaelab.training.trainer import Trainer, build_model

CPU, GREY = torch.device("cpu"), (1, 28, 28)
ALL = [
    specs.Bernoulli(), specs.ContinuousBernoulli(), specs.Gaussian(), specs.OptimalGaussian(), specs.PixelGaussian(),
    specs.Laplace(), specs.DiscretizedLogistic(), specs.LogisticMixture(3), specs.Categorical256(),
]  # fmt: skip
TINY = override(recipe("mlp"), encoder_hidden_dims=(8,), decoder_hidden_dims=(8,), latent_dim=4)


def of_images(x: torch.Tensor, *, binary: bool = False) -> Dataset:
    part = Split(x, None, torch.arange(len(x)))
    return Dataset("some-images", "grey", part, part, part, binary=binary, classes=None)


@pytest.fixture(scope="module")
def data():
    """Pixels of each kind, by name."""
    x = torch.rand(70, *GREY, generator=torch.Generator().manual_seed(0))
    return {
        "bytes": of_images((x * 255).to(torch.uint8)),
        "floats": of_images(x),
        "levels": of_images((x * 255).round() / 255),
        "binary": of_images(x.round().mul(255).to(torch.uint8), binary=True),
        "0 and 1": of_images(x.round()),
        "outside": of_images(2 * x - 1),
    }


FIT = {
    "binary": {"bytes", "floats", "levels", "binary", "0 and 1", "outside"},  # grey: a cross-entropy, and named so
    "real": {"bytes", "floats", "levels", "outside"},
    "unit": {"bytes", "floats", "levels"},
    "bytes": {"bytes", "levels", "binary", "0 and 1"},
}


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_a_likelihood_is_refused_on_data_that_it_is_none_of(spec, data):
    part = spec.build(1)
    for name, images in data.items():
        if name in FIT[part.support]:
            require_fit(part, images, ("train",))
        else:
            with pytest.raises(UsageError, match=f"--likelihood {spec.word} is .*--likelihood"):
                require_fit(part, images, ("train",))


@pytest.mark.parametrize(
    ("spec", "name", "message"),
    [
        (specs.Gaussian(), "binary", "those of some-images are 0 or 1: .*; take --likelihood bernoulli"),
        (specs.OptimalGaussian(), "0 and 1", "can grow without bound"),
        (specs.ContinuousBernoulli(), "outside", r"go from -0\.99\d* to .*: rescale them"),
        (specs.Categorical256(), "floats", "is no multiple of 1/255.*: save the images as bytes"),
    ],
)
def test_training_and_evaluation_refuse_it_in_one_line(spec, name, message, data):
    run = override(TINY, likelihood=spec)
    model = build_model(run, GREY).eval()
    for attempt in (
        lambda: Trainer(run, data[name], CPU),
        lambda: evaluate(model, run, data[name]),
        lambda: nll(model, data[name], num_samples=1),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            attempt()
        assert "\n" not in str(refused.value)


def test_the_doctor_still_names_a_density_on_binary_pixels():
    """Runs of earlier versions have it: what cannot be trained any more can be examined."""
    binary = load("digits", protocol="threshold")
    for spec in (specs.Gaussian(), specs.ContinuousBernoulli()):
        run = override(TINY, likelihood=spec, protocol="threshold")
        for model in (None, build_model(run, GREY).eval()):
            found = diagnose(examine(run, model, binary, [], images=20))
            assert "likelihood does not fit" in [finding.name for finding in found]


@pytest.mark.parametrize(("protocol", "binary"), [("grey", False), ("threshold", True)])
@pytest.mark.parametrize("spec", ALL, ids=str)
def test_is_density_says_of_which_data(spec, protocol, binary):
    model = build_model(override(TINY, likelihood=spec), GREY)
    expected = {"binary": binary, "bytes": True, "unit": not binary, "real": not binary}[model.likelihood_head.support]
    assert model.is_density(binary_data=binary) is expected


@pytest.mark.parametrize(
    ("spec", "name", "words", "bits"),
    [
        (specs.Bernoulli(), "bytes", "cross-entropy: not a likelihood", None),
        (specs.Bernoulli(), "binary", "binary pixels, 1 posterior sample", 1.0),
        (specs.Categorical256(), "bytes", "mass over 256 levels", 8.0),
        (specs.ContinuousBernoulli(), "bytes", "density over [0, 1]", 0.0),
        (specs.Gaussian(), "bytes", "density of pixels scaled to [0, 1]", None),
    ],
    ids=str,
)
def test_bits_per_dimension_stand_beside_what_they_are_of(spec, name, words, bits, data):
    """A decoder that says nothing costs 1 bit a binary pixel, 8 an 8-bit one, and 0 as a density over [0, 1]."""
    run = override(TINY, likelihood=spec)
    model = build_model(run, GREY).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    found = evaluate(model, run, data[name])
    assert all(estimate.protocol.endswith(words) for estimate in found.values())
    assert ("bits_per_dim" in found) == (spec.word != "bernoulli" or name == "binary")
    if bits is not None:
        rate = found["rate"].value / (math.prod(GREY) * math.log(2))
        assert found["bits_per_dim"].value - rate == pytest.approx(bits, abs=1e-5)


def halves(first, second):
    parts = [Split(x, None, torch.arange(len(x))) for x in (first, second)]
    return Dataset("some", "grey", parts[0], parts[1], parts[1], binary=False, classes=None)


def test_every_image_of_every_split_is_looked_at():
    grey = torch.rand(600, 1, 4, 4)
    require_fit(specs.Gaussian().build(1), halves(grey.round(), grey), ("train", "validation"))
    late = grey.clone()
    late[-1, 0, 0, 0] = 1.5
    with pytest.raises(UsageError, match="go from"):
        require_fit(specs.ContinuousBernoulli().build(1), halves(grey, late), ("train", "validation"))
