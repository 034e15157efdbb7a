"""Importing the package stays cheap: no Triton, no accelerator, no model code of transformers, no compiler."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, sys
import torch
lazily = {"done": False}
torch.cuda.init = torch.cuda._lazy_init = lambda *a, **k: lazily.update(done=True)
before = set(sys.modules)
import fastadapt
loaded = set(sys.modules) - before
print(json.dumps({
    "cuda": lazily["done"] or torch.cuda.is_initialized(),
    "loaded": sorted(loaded),
    "public": sorted(set(fastadapt.__all__) - set(dir(fastadapt))),
}))
"""


def probe() -> dict:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_nothing_heavy_and_touches_no_accelerator():
    found = probe()
    assert not found["cuda"]
    roots = {name.partition(".")[0] for name in found["loaded"]}
    assert not roots & {"triton", "adapters", "peft", "openvino", "onnxruntime", "matplotlib"}
    heavy = [name for name in found["loaded"] if name.startswith("transformers.models.")]
    assert not heavy, heavy
    assert "torch.utils.cpp_extension" not in found["loaded"]
    assert found["public"] == []


def test_import_does_not_load_the_benchmarks():
    assert not [name for name in probe()["loaded"] if name.startswith(("fastadapt.bench", "fastadapt.cli"))]
