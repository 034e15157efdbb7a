"""Importing the package stays cheap: no Triton, no accelerator, no model code of transformers, no compiler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

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


def importers(what: str) -> set[str]:
    """The rooms of the package (a folder, or a file) in which something imports from ``what``."""
    root = Path(__file__).resolve().parent.parent / "fastadapt"
    found = set()
    for path in root.rglob("*.py"):
        if re.search(rf"^ *(from {re.escape(what)}\b|import {re.escape(what)}\b)", path.read_text(), re.MULTILINE):
            found.add(path.relative_to(root).parts[0])
    return found


def test_only_the_command_line_knows_the_benchmarks():
    assert importers("fastadapt.bench") == {"bench", "cli"}


def test_modules_and_what_lies_below_know_no_model_library():
    for what in ("fastadapt.models", "transformers"):
        assert not importers(what) & {"modules", "ops", "backends", "dispatch.py", "config"}


def test_import_does_not_load_the_benchmarks():
    assert not [name for name in probe()["loaded"] if name.startswith(("fastadapt.bench", "fastadapt.cli"))]
