"""Products of a traced step are the same numbers, whichever library computes them, and whatever the machine lacks."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import vaelab as v
from vaelab.config import override
from vaelab.recipes import recipe
from vaelab.runtime import cpu_flags, threads
from vaelab.training import products
from vaelab.training.compiling import can_compile
from vaelab.training.products import by_onednn, by_tiles, has_tiles, tiles
from vaelab.training.products.convolutions import CONVOLUTIONS
from vaelab.training.trainer import Trainer

CPU = torch.device("cpu")
TINY = {"encoder_hidden_dims": (128,), "decoder_hidden_dims": (128,), "latent_dim": 4, "batch_size": 96}
needs_compiler = pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler or no headers of Python here")
needs_tiles = pytest.mark.skipif(not has_tiles(CPU), reason="this processor has no tile units (AMX), or no compiler")


def first_terms(precision: str, compiled: str, data: v.data.Dataset) -> torch.Tensor:
    """The terms of twenty steps."""
    run = override(recipe("mlp"), data="digits", epochs=3, **TINY, precision=precision, compile=compiled)
    trainer = Trainer(run, data, CPU)
    for _ in range(20):
        trainer.train_step()
    assert compiled == "off" or not trainer._take_step._failed
    return trainer.terms[:20]


# --- oneDNN ---------------------------------------------------------------------------------------------------------


has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def several(bias, x, weight, small):
    return x @ weight, torch.addmm(bias, x, weight), small @ small, (x.bfloat16() @ weight.bfloat16()).float()


@has_onednn
def test_onednn_computes_the_large_fp32_products_of_a_graph():
    torch.manual_seed(0)
    given = (torch.randn(300), torch.randn(300, 70).t(), torch.randn(300, 300).t(), torch.randn(10, 10))
    graph = make_fx(several, tracing_mode="fake")(*given)
    assert by_onednn(graph) == 2
    assert {str(node.target) for node in graph.graph.nodes if node.op == "call_function"} >= {
        "vaelab.product.default", "vaelab.affine.default", "aten.mm.default",
    }  # fmt: skip
    exact = several(*(tensor.double() for tensor in given))
    for found, whole in zip(graph(*given)[:3], exact[:3], strict=True):
        torch.testing.assert_close(found.double(), whole, rtol=0, atol=1e-4)
    assert torch.equal(graph(*given)[3], several(*given)[3]), "bf16 products are left alone"


@has_onednn
@pytest.mark.parametrize(
    "bias", [torch.ones(1), torch.ones(1).expand(300), torch.arange(600.0)[::2], torch.ones(1, 300)]
)
def test_biases_of_any_layout_are_added(bias):
    torch.manual_seed(0)
    given = bias, torch.randn(300, 300), torch.randn(300, 300)
    graph = make_fx(torch.addmm, tracing_mode="fake")(*given)
    assert by_onednn(graph) == (bias.shape == (300,))
    torch.testing.assert_close(graph(*given), torch.addmm(*given), rtol=1e-4, atol=1e-4)


@has_onednn
def test_no_product_of_fp32_is_rounded_to_bf16():
    """Sums of products of numbers that bf16 cannot tell apart from 1."""
    x = torch.full((200, 200), 1 + 2**-12)
    graph = make_fx(torch.mm, tracing_mode="fake")(x, x)
    assert by_onednn(graph) == 1
    torch.testing.assert_close(graph(x, x), x @ x, rtol=1e-6, atol=0)
    assert (graph(x, x) > 200.05).all()


@has_onednn
@needs_compiler
def test_compiled_steps_with_onednns_products_are_the_plain_ones(digits, monkeypatch):
    asked = []
    monkeypatch.setattr(products, "prefers_onednn", lambda device: True)
    monkeypatch.setattr(products, "by_onednn", lambda graph: asked.append(by_onednn(graph)))
    plain, compiled = (first_terms("fp32", way, digits) for way in ("off", "on"))
    assert asked == [5], "the first and the last layer: forward, weights, and what flows back through the last"
    torch.testing.assert_close(compiled, plain, rtol=2e-5, atol=1e-4)


# --- tile units -----------------------------------------------------------------------------------------------------


def error(found: torch.Tensor, exact: torch.Tensor, inner: int) -> float:
    """The largest, over what one rounding to bf16 (a 256th) after a sum in fp32 of terms of size 1 may make."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    return float(((found.double() - exact).abs() / (exact.abs() / 256 + inner**0.5 * 1e-6)).max())


@needs_tiles
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(128, 784, 400), (400, 128, 784), (1, 1, 1), (1, 40, 3), (3, 1, 40), (33, 31, 17), (16, 32, 16), (47, 65, 96)],
)
def test_tiles_multiply_matrices_of_any_size_in_any_layout(rows, inner, columns):
    torch.manual_seed(0)
    a, b, bias = (torch.randn(*size).bfloat16() for size in ((rows, inner), (inner, columns), (columns,)))
    exact = a.double() @ b.double()
    wide = torch.randn(rows, 2 * inner).bfloat16()
    wide[:, :inner] = a
    spread = torch.randn(rows, 2 * inner).bfloat16()
    spread[:, ::2] = a
    lying = [(a, False), (a.t().contiguous(), True), (wide[:, :inner], False), (spread[:, ::2], False), (a.t(), True)]
    for x, x_turned in lying:
        for y, y_turned in ((b, False), (b.t().contiguous(), True), (b.t(), True)):
            plain = torch.ops.vaelab.tile_product(x, y, x_turned, y_turned)
            assert error(plain, exact, inner) <= 1
            affine = torch.ops.vaelab.tile_affine(bias, x, y, x_turned, y_turned)
            assert error(affine, exact + bias.double(), inner) <= 1


@needs_tiles
def test_tiles_read_repeated_rows_and_biases_with_gaps():
    torch.manual_seed(0)
    row, b, bias = torch.randn(70).bfloat16(), torch.randn(70, 50).bfloat16(), torch.randn(100).bfloat16()[::2]
    a, c = row.expand(40, 70), row[:1].expand(70, 90)
    affine = torch.ops.vaelab.tile_affine(bias, a, b, False, False)
    assert error(affine, a.double() @ b.double() + bias.double(), 70) <= 1
    plain = torch.ops.vaelab.tile_product(b, c, True, False)
    assert error(plain, b.double().t() @ c.double(), 70) <= 1


@needs_tiles
def test_tiles_give_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    a, b = torch.randn(300, 500).bfloat16(), torch.randn(500, 260).bfloat16()
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(torch.ops.vaelab.tile_product(a, b, False, False))
    beside = []
    work = [threading.Thread(target=lambda: beside.append(torch.ops.vaelab.tile_product(a, b, False, False)))
            for _ in range(4)]  # fmt: skip
    for one in work:
        one.start()
    for one in work:
        one.join()
    assert all(torch.equal(other, found[0]) for other in (*found, *beside))


@needs_tiles
def test_tiles_keep_what_is_not_finite():
    a = torch.ones(40, 50).bfloat16()
    a[3, 4], a[20, 0] = torch.inf, torch.nan
    found = torch.ops.vaelab.tile_product(a, torch.ones(50, 30).bfloat16(), False, False)
    assert torch.isinf(found[3]).all()
    assert torch.isnan(found[20]).all()
    assert torch.isfinite(found).sum() == 38 * 30


def layers(bias, x, weight, wide):
    hidden = torch.addmm(bias, x, weight.t())
    back = hidden @ weight
    return hidden, back, hidden.t() @ x, wide @ wide, x.float() @ weight.float().t(), torch.addmm(hidden, x, weight.t())


def test_tiles_take_the_small_bf16_products_of_a_graph_and_read_what_is_transposed_as_it_lay():
    given = [torch.randn(*size).bfloat16() for size in ((60,), (50, 70), (60, 70), (400, 400))]
    graph = make_fx(layers, tracing_mode="fake")(*given)
    assert by_tiles(graph) == 3
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("vaelab.tile_product.default") == 2
    assert names.count("vaelab.tile_affine.default") == 1
    assert names.count("aten.mm.default") == 2, "a large product and one of fp32"
    assert names.count("aten.addmm.default") == 1, "what is added is no bias"
    turned = [node.args[-2:] for node in graph.graph.nodes if "tile" in str(node.target)]
    assert turned == [(False, True), (False, False), (True, False)]
    if has_tiles(CPU):
        for found, exact in zip(graph(*given)[:3], layers(*(x.double() for x in given))[:3], strict=True):
            assert (found.double() - exact).norm() < 0.01 * exact.norm()


@needs_tiles
@needs_compiler
def test_compiled_steps_on_tiles_are_those_of_torchs_products(digits, monkeypatch):
    """As near as two orders of summation in bf16 are; and they are taken."""
    asked = []
    monkeypatch.setattr(products, "by_tiles", lambda graph: asked.append(by_tiles(graph)))
    on_tiles = first_terms("bf16", "on", digits)
    assert asked == [11], "four layers: forward, weights, and what flows back through all but the first"
    monkeypatch.setattr(products, "has_tiles", lambda device: False)
    torch.testing.assert_close(on_tiles, first_terms("bf16", "on", digits), rtol=2e-3, atol=2e-2)


# --- convolutions ---------------------------------------------------------------------------------------------------

CONV = torch.ops.aten.convolution.default
CONV_BACKWARD = torch.ops.aten.convolution_backward.default


def traced(function, *inputs):
    graph = make_fx(function, CONVOLUTIONS, tracing_mode="fake")(*inputs)
    return graph, [str(node.target) for node in graph.graph.nodes]


def close(found, exact):
    """A few roundings to bf16, each of a 256th at most and of a thousandth in the mean."""
    assert found.shape == exact.shape
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 4e-3 * exact.norm()


@needs_tiles
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("channels", "out", "size"), [(32, 64, (14, 14)), (5, 3, (9, 8)), (70, 40, (1, 7))])
def test_convolutions_as_products_are_convolutions(channels, out, size, transposed):
    torch.manual_seed(0)
    small = [(side + 1) // 2 for side in size]
    grow = [1 - side % 2 for side in size] if transposed else [0, 0]
    x = torch.randn(6, out, *small) if transposed else torch.randn(6, channels, *size)
    bias = torch.randn(channels if transposed else out).bfloat16()
    x, weight = x.bfloat16(), (torch.randn(out, channels, 3, 3) / 10).bfloat16()
    kind = [2, 2], [1, 1], [1, 1], transposed, grow, 1

    def forward(x, weight, bias):
        return CONV(x, weight, bias, *kind)

    def backward(grad, x, weight):
        return CONV_BACKWARD(grad, x, weight, [len(bias)], *kind, [True, True, True])

    graph, names = traced(forward, x, weight, bias)
    assert "aten.convolution.default" not in names
    exact = forward(x.double(), weight.double(), bias.double())
    close(graph(x, weight, bias), exact)
    grad = torch.randn_like(exact).bfloat16().contiguous(memory_format=torch.channels_last)
    graph, names = traced(backward, grad, x, weight)
    assert "aten.convolution_backward.default" not in names
    for found, one in zip(graph(grad, x, weight), backward(grad.double(), x.double(), weight.double()), strict=True):
        close(found, one)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True]])
def test_only_the_gradients_that_are_asked_for_are_traced(wanted, transposed):
    small, large, weight = (torch.randn(*size).bfloat16() for size in ((2, 6, 4, 4), (2, 5, 8, 8), (6, 5, 3, 3)))
    given = (large, small, weight) if transposed else (small, large, weight)

    def backward(grad, x, weight):
        kind = [2, 2], [1, 1], [1, 1], transposed, [1, 1], 1
        found = CONV_BACKWARD(grad, x, weight, [5 if transposed else 6], *kind, wanted)
        assert [one is not None for one in found] == wanted
        return [one for one in found if one is not None]

    _, names = traced(backward, *given)
    assert names.count("aten.mm.default") == (not wanted[2])
    assert names.count("vaelab.windows.default") == (wanted[1] or (transposed and wanted[0]))
    assert names.count("vaelab.spread.default") == (wanted[0] and not transposed)


@pytest.mark.parametrize(
    ("dtype", "weight", "kind"),
    [
        (torch.float32, (6, 5, 3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
        (torch.bfloat16, (6, 5, 5, 5), ([2, 2], [2, 2], [1, 1], False, [0, 0], 1)),
        (torch.bfloat16, (6, 5, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
        (torch.bfloat16, (6, 5, 3, 3), ([2, 2], [0, 0], [1, 1], False, [0, 0], 1)),
        (torch.bfloat16, (6, 5, 3, 3), ([2, 2], [1, 1], [2, 2], False, [0, 0], 1)),
        (torch.bfloat16, (5, 1, 3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 5)),
    ],
)
def test_other_convolutions_stay_what_they_are(dtype, weight, kind):
    given = torch.randn(2, 5, 9, 9).to(dtype), torch.randn(*weight).to(dtype)
    graph, names = traced(lambda x, w: CONV(x, w, None, *kind), *given)
    assert "aten.convolution.default" in names
    assert torch.equal(graph(*given), CONV(*given[:2], None, *kind))


# --- building -------------------------------------------------------------------------------------------------------


@pytest.fixture
def able(monkeypatch, tmp_path):
    """A processor that says it has tile units, and a cache folder in which nothing was built."""
    monkeypatch.setattr(tiles, "cpu_flags", lambda: {"amx_tile", "amx_bf16", "avx512_bf16"})
    monkeypatch.setattr(tiles, "user_cache_path", lambda *_, **__: tmp_path)
    return tmp_path


def test_without_tile_units_nothing_is_built(able, monkeypatch):
    monkeypatch.setattr(tiles, "cpu_flags", lambda: {"avx512_bf16"})
    assert not has_tiles.__wrapped__(CPU)
    assert not has_tiles.__wrapped__(torch.device("cuda"))
    assert not list(able.iterdir())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_library_that_cannot_be_built_costs_one_line(able, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, "vaelab"):
        assert not has_tiles.__wrapped__(CPU)
    assert caplog.text.count("tile units") == 1
    assert compiler in caplog.text
    assert not [path for path in able.rglob("*") if path.is_file()], "no half of a library is left"


def test_a_cache_that_cannot_be_written_costs_one_line(able, monkeypatch, caplog):
    (able / "compiled").write_text("a file in the folder's place")
    with caplog.at_level(logging.INFO, "vaelab"):
        assert not has_tiles.__wrapped__(CPU)
    assert caplog.text.count("tile units") == 1


@needs_compiler
@pytest.mark.skipif(not {"sse2"} <= cpu_flags(), reason="a library for x86-64")
def test_the_library_is_built_once_and_rebuilt_for_another_torch(tmp_path, monkeypatch):
    first = tiles._built(tmp_path)
    made = first.stat().st_mtime_ns
    assert tiles._built(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    monkeypatch.setattr(torch, "__version__", "another")
    assert tiles._built(tmp_path) != first
    assert len([path for path in Path(tmp_path).iterdir() if path.suffix == ".so"]) == 2
