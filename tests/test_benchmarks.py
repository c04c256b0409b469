"""The benchmark that a lent GPU gets one call for runs through, on the CPU, so that the call is not wasted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vaelab.recipes import recipe
from vaelab.training.compiling import can_compile
from vaelab.training.trainer import build_model

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler or no headers of Python here")
def test_the_gpu_benchmark_runs_through_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--steps", "3", "--checked", "mlp", "--recipes", "mlp", "--seeds", "--out", str(out)]
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert max(result["correctness"].values()) < 1e-4
    assert len(result["correctness"]) == 3
    assert [(row["precision"], row["compile"]) for row in result["speed"]] == [
        ("fp32", "off"), ("fp32", "on"), ("bf16", "off"), ("bf16", "on"),
    ]  # fmt: skip
    assert all(row["images_per_second"] > 0 for row in result["speed"])
    assert "mlp" in done.stdout
    parts = build_model(recipe("mlp"), (1, 28, 28)).modules()
    layers = [part.weight.numel() for part in parts if isinstance(part, torch.nn.Linear)]
    for row in result["speed"]:
        seconds = row["ms_per_step"] / 1e3
        products = 2 * row["images_per_second"] * seconds * (3 * sum(layers) - layers[0])
        assert row["tflops"] * 1e12 * seconds == pytest.approx(products), "one forward, two back, the first layer one"
