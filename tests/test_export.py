"""What leaves the house gives the model's numbers: ONNX in onnxruntime alone, safetensors to the last bit."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import vaelab
from vaelab import export
from vaelab.cli import main
from vaelab.config import override
from vaelab.errors import FailureError, UsageError
from vaelab.recipes import recipe
from vaelab.runtime import StepNoise
from vaelab.training.trainer import build_model

# Each covers other layers: dense; strided and transposed convolutions, batch norm, dropout; colour, a Gaussian.
MODELS = {
    "mlp": ("mlp", {"encoder_hidden_dims": (32,)}, (1, 28, 28)),
    "conv": ("conv-beta", {"z_dim": 5}, (1, 28, 28)),
    "colour": ("conv-2d", {"z_dim": 7}, (3, 20, 12)),
    "unit": ("mlp-2d", {"z_dim": 1}, (1, 9, 8)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, changes, shape = MODELS[request.param]
    model = build_model(override(recipe(name), **changes), shape)
    with torch.no_grad():  # away from the initial weights, whose biases are all alike
        model.train()
        for _ in range(3):
            model.draw(torch.rand(16, *shape), noise=StepNoise(0, 0))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("graph", ["encoder", "decoder", "scorer"])
def test_a_graph_gives_the_models_numbers_for_any_number_of_rows(model, graph):
    content = export.to_onnx(model, graph, {"recipe": "x", "shape": [1, 2]})
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    run = export.onnx_session(content)
    for count in (1, 2, 7):
        x = torch.rand(count, *model.shape) if graph != "decoder" else torch.randn(count, model.latent_dim)
        found = run(x.numpy())
        qz = model.posterior(x) if graph != "decoder" else None
        with torch.no_grad():
            px = model.likelihood(x if qz is None else qz.mean)
        expected = [px.mean] if qz is None else [qz.mean, qz.stddev]
        if graph == "scorer":
            kl = torch.distributions.kl_divergence(
                torch.distributions.Independent(torch.distributions.Normal(qz.mean, qz.stddev), 1),
                torch.distributions.Independent(torch.distributions.Normal(0 * qz.mean, 1 + 0 * qz.mean), 1),
            )
            expected += [px.mean, -px.log_prob(x), kl]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("posterior", ["full-normal", "radial", "iaf", "gumbel-softmax", "deterministic"])
def test_encoders_of_other_posteriors_take_any_number_of_rows(posterior):
    prior = {"gumbel-softmax": "uniform-categories"}.get(posterior, "standard-normal")
    small = {"encoder_hidden_dims": (16,), "decoder_hidden_dims": (16,)}
    run = override(override(recipe("mlp"), posterior=posterior, prior=prior), **small)
    model = build_model(run, (1, 12, 10)).eval()
    for count in (1, 2, 7):
        x = torch.rand(count, 1, 12, 10, generator=torch.Generator().manual_seed(count))
        assert all(one.holds for one in export.parity(model, "encoder", export.to_onnx(model, "encoder", {}), x))


def test_codes_that_all_but_tie_are_as_good_and_others_are_not():
    model = build_model(override(recipe("vq"), grid=(3, 2), num_codes=8, code_dim=4), (1, 12, 8)).eval()
    x = torch.rand(16, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    head = model.posterior_head
    with torch.no_grad():
        z_e = head._sites(model.encoder(x[:1]))[0, 0]
        head.codebook[0], head.codebook[1] = 1.1 * z_e, 0.9 * z_e  # in the middle of two codes, and then to one side
        head.to_code.bias += 1e-4 * z_e
        content = export.to_onnx(model, "encoder", {})
        head.to_code.bias -= 2e-4 * z_e
    [found] = export.parity(model, "encoder", content, x)
    assert found.difference == pytest.approx(0.2 * float(z_e.abs().max()), rel=0.01), "the graph took the other one"
    assert found.holds
    with torch.no_grad():
        head.to_code.bias -= 1e-2 * z_e
    with pytest.raises(FailureError, match="the encoder's loc differs from the model's by"):
        export.parity(model, "encoder", content, x)


def test_nothing_is_drawn_in_a_graph(model):
    run = export.onnx_session(export.to_onnx(model, "encoder", {}))
    x = np.random.default_rng(0).random((3, *model.shape), np.float32)
    for one, other in zip(run(x), run(x), strict=True):
        np.testing.assert_array_equal(one, other)
    kinds = {node.op_type for node in onnx.load_from_string(export.to_onnx(model, "encoder", {})).graph.node}
    assert not any("Random" in kind or kind == "Bernoulli" for kind in kinds)


@pytest.mark.parametrize("opset", [18, 20])
def test_opset_and_origin_are_written_inside(opset):
    model = build_model(recipe("mlp"), (1, 8, 8)).eval()
    made = onnx.load_from_string(export.to_onnx(model, "decoder", {"recipe": "mlp", "shape": [1, 8, 8]}, opset=opset))
    assert {entry.domain: entry.version for entry in made.opset_import}[""] == opset
    about = {entry.key: entry.value for entry in made.metadata_props}
    assert about["vaelab.graph"] == "decoder"
    assert about["vaelab.recipe"] == "mlp"
    assert json.loads(about["vaelab.shape"]) == [1, 8, 8]


def test_a_graph_of_another_model_is_found_out(model):
    torch.manual_seed(1)
    with torch.no_grad():
        changed = {name: value + 0.01 * torch.randn(value.shape) if value.is_floating_point() else value
                   for name, value in model.state_dict().items()}  # fmt: skip
    content = export.to_onnx(model, "decoder", {})
    z = torch.randn(16, model.latent_dim)
    assert all(one.difference < 1e-4 for one in export.parity(model, "decoder", content, z))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(changed)
    try:
        with pytest.raises(FailureError, match="the decoder's mean differs from the model's by"):
            export.parity(model, "decoder", content, z)
    finally:
        model.load_state_dict(before)


def test_numbers_that_are_not_finite_do_not_pass():
    model = build_model(recipe("mlp"), (1, 8, 8)).eval()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(FailureError, match="differs from the model's by nan"):
        export.parity(model, "decoder", export.to_onnx(model, "decoder", {}), torch.randn(16, 20))


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a folder of colour images of another size."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (24, 16, 3), np.uint8)).save(folder / f"{i}.png")
    out = folder.parent / "run"
    arguments = ["--data", str(folder), "--image-size", "24", "16", "--epochs", "2", "--batch-size", "16"]
    assert main(["train", "conv-2d", *arguments, "--out", str(out)]) == 0
    return out


ALONE = """
import sys
sys.modules["torch"] = sys.modules["vaelab"] = None  # importing either would fail
import numpy as np, onnxruntime
for graph, given in (("encoder", "x"), ("decoder", "z")):
    session = onnxruntime.InferenceSession(f"{sys.argv[1]}/{graph}.onnx")
    assert session.get_modelmeta().custom_metadata_map["vaelab.recipe"] == "conv-2d"
    out = session.run(None, {given: np.load(f"{sys.argv[1]}/{given}.npy")})
    np.savez(f"{sys.argv[1]}/{graph}.npz", *out)
"""


def test_exported_graphs_run_without_torch_and_vaelab(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "opset 18" in said
    assert "largest difference from the model: loc" in said
    x, z = torch.rand(5, 3, 24, 16), torch.randn(5, 2)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "z.npy", z.numpy())
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)
    model = vaelab.load_model(run)
    with torch.no_grad():
        qz, mean = model.posterior(x), model.likelihood(z).mean
    encoded, decoded = np.load(tmp_path / "encoder.npz"), np.load(tmp_path / "decoder.npz")
    np.testing.assert_allclose(encoded["arr_0"], qz.mean, atol=1e-4)
    np.testing.assert_allclose(encoded["arr_1"], qz.stddev, atol=1e-4)
    np.testing.assert_allclose(decoded["arr_0"], mean, atol=1e-4)


def test_safetensors_hold_weights_and_configuration(run, capsys):
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    assert "exactly" in capsys.readouterr().out
    ours, theirs = vaelab.load_model(run), vaelab.load_model(run / "export" / "model.safetensors")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert not theirs.training


@pytest.mark.parametrize(("damage", "message"), [
    (lambda raw: raw[:100], "no safetensors file of vaelab"),
    (lambda raw: raw.replace(b"latent_dim\\\": 2", b"latent_dim\\\": 9"), "does not fit its configuration"),
    (lambda raw: raw.replace(b"__metadata__", b"__metadatb__"), "no safetensors file of vaelab"),
])  # fmt: skip
def test_a_damaged_safetensors_file_is_named(run, tmp_path, damage, message):
    content = export.to_safetensors(vaelab.load_model(run), json.loads((run / "config.json").read_text()))
    (tmp_path / "m.safetensors").write_bytes(damage(content))
    with pytest.raises(FailureError, match=message):
        vaelab.load_model(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="cannot be read"):
        vaelab.load_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--opset", "7"], "--opset 7: there is 18 to 23"),
    (["--format", "safetensors", "--opset", "18"], "--opset 18 belongs to --format onnx"),
    (["--out", "FILE"], "is a file: choose another folder"),
])  # fmt: skip
def test_wrong_values_are_one_line(run, tmp_path, arguments, message, capsys):
    (tmp_path / "FILE").write_text("mine")
    arguments = [str(tmp_path / a) if a == "FILE" else a for a in arguments]
    assert main(["export", str(run), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "FILE").read_text() == "mine"


@pytest.mark.parametrize(("package", "arguments"), [("onnxscript", []), ("safetensors", ["--format", "safetensors"])])
def test_a_missing_package_is_named_with_its_remedy(run, monkeypatch, capsys, package, arguments):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else find(name, *a))
    assert main(["export", str(run), *arguments]) == 2
    assert f"exporting needs {package}: pip install {package}" in capsys.readouterr().err


def test_what_torch_cannot_export_is_said_in_one_line_without_colours(monkeypatch):
    model = build_model(recipe("mlp"), (1, 28, 28)).eval()

    def fail(*_, **__):
        try:
            raise ValueError("no function for \x1b[96mlgamma\x1b[0m\nand more")
        except ValueError as error:
            raise torch.onnx.OnnxExporterError("Failed. This is step 3/3") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(FailureError) as refused:
        export.to_onnx(model, "decoder", {})
    assert str(refused.value) == "torch cannot export the decoder: ValueError: no function for lgamma"
