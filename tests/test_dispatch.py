"""Which backend serves an op, and what is said where none can."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

import fastadapt as fa
from fastadapt import dispatch, environment
from fastadapt.environment import cpu_model
from fastadapt.training.options import _fast_dtype


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {n: v for n, v in os.environ.items() if n not in ("FASTADAPT_BACKEND", "TRITON_INTERPRET")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def _stand_in(reason: str | None) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    module.refusal = lambda op, device_type, dtype, facts: reason
    module.add_norm_forward = lambda *a: "served by the stand-in"
    return module


def test_importing_loads_no_triton_and_touches_no_accelerator():
    done = _python(
        "import sys, torch, fastadapt\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_triton_backend_touches_no_accelerator():
    pytest.importorskip("triton")
    done = _python("import torch, fastadapt.backends.triton\nassert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr


def test_the_context_forces_and_gives_back():
    before = dispatch.forced()
    with fa.backend("reference"):
        assert dispatch.forced() == "reference"
        assert dispatch.choice("add_norm_forward", "cpu", torch.float32, hidden=8) == ("reference", {})
    assert dispatch.forced() == before


def test_the_context_gives_back_after_an_error():
    before = dispatch.forced()
    with pytest.raises(KeyError), fa.backend("reference"):
        raise KeyError
    assert dispatch.forced() == before


def test_an_unknown_backend_is_named_with_what_is_accepted():
    with (
        pytest.raises(ValueError, match="backend: got 'tpu'; accepted are reference, cpu, triton, cuda"),
        fa.backend("tpu"),
    ):
        pass


def test_the_environment_forces_a_backend():
    code = "from fastadapt import dispatch; print(dispatch.forced())"
    assert _python(code, FASTADAPT_BACKEND="reference").stdout.strip() == "reference"
    assert _python(code, FASTADAPT_BACKEND="").stdout.strip() == "None"
    failed = _python(code, FASTADAPT_BACKEND="fast")
    assert failed.returncode != 0
    assert "FASTADAPT_BACKEND: got 'fast'; accepted are" in failed.stderr


def test_the_first_that_does_not_refuse_serves(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", _stand_in(None))
    assert dispatch.pick("add_norm_forward", "cpu", torch.float32, hidden=8)() == "served by the stand-in"
    monkeypatch.setitem(dispatch._loaded, "cpu", _stand_in("too small"))
    name, refused = dispatch.choice("add_norm_forward", "cpu", torch.float32, hidden=8)
    assert (name, refused) == ("reference", {"cpu": "too small"})
    picked = dispatch.pick("add_norm_forward", "cpu", torch.float32, hidden=8)
    assert picked is dispatch.load("reference").add_norm_forward


def test_a_forced_backend_that_refuses_raises_with_its_reason(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", _stand_in("needs a wider H"))
    with (
        fa.backend("cpu"),
        pytest.raises(RuntimeError, match="'cpu' was forced but cannot run add_norm_forward: needs a"),
    ):
        fa.ops.add_norm(torch.ones(2, 4), None, torch.ones(4), torch.ones(4))


def test_a_backend_that_cannot_be_loaded_says_why(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cuda", "cuda backend cannot be loaded: no module")
    assert (
        dispatch.refusal("cuda", "add_norm_forward", "cuda", torch.float32)
        == "cuda backend cannot be loaded: no module"
    )
    with pytest.raises(RuntimeError, match="cannot be loaded"), fa.backend("cuda"):
        pass


def test_a_device_without_a_row_in_the_table_takes_the_reference():
    assert dispatch.choice("add_norm_forward", "xpu", torch.float32) == ("reference", {})


# -- the Triton backend's own refusals ---------------------------------------------------------------------------


@pytest.fixture
def triton_backend():
    pytest.importorskip("triton")
    module = dispatch.load("triton")
    assert not isinstance(module, str), module
    return module


def test_triton_refuses_float64_attention_and_other_devices(triton_backend):
    facts = {"hidden": 768, "bottleneck": 64}
    assert "float64" in triton_backend.refusal("bottleneck_forward", "cuda", torch.float64, facts)
    assert "scaled_dot_product_attention" in triton_backend.refusal("attention_forward", "cuda", torch.float16, {})
    assert "xpu" in triton_backend.refusal("bottleneck_forward", "xpu", torch.float16, facts)


def test_triton_serves_cpu_tensors_in_the_interpreter_only(triton_backend):
    facts = {"hidden": 768, "bottleneck": 64}
    code = (
        "import torch, fastadapt.backends.triton as t\n"
        f"print(t.refusal('bottleneck_forward', 'cpu', torch.float32, {facts!r}))"
    )
    assert _python(code, TRITON_INTERPRET="1").stdout.strip() == "None"
    assert "TRITON_INTERPRET" in _python(code, TRITON_INTERPRET="0").stdout


def test_triton_refuses_what_does_not_fit(triton_backend):
    wide = triton_backend.refusal("bottleneck_forward", "cuda", torch.float16, {"hidden": 768, "bottleneck": 4096})
    assert "bottleneck" in wide
    wide = triton_backend.refusal("add_norm_forward", "cuda", torch.float16, {"hidden": 1 << 20})
    assert "hidden" in wide


def test_triton_leaves_a_plain_product_to_the_vendor_library(triton_backend, monkeypatch):
    from fastadapt.backends.triton import launch, linear

    def refuse(*arguments, **options):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch, "architecture", lambda x: launch.SM_90)
    monkeypatch.setattr(launch, "linear_product", refuse)
    x, w, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    y, z = linear.forward(x, [w, w], [b, None], "none", 0.0, None, True)
    assert torch.equal(y, torch.cat([torch.nn.functional.linear(x, w, b), x @ w.t()], 1)) and z.numel() == 0
    with pytest.raises(AssertionError, match="launched"):
        linear.forward(x, [w], [b], "gelu", 0.0, None, True)


def test_on_a_gpu_the_kernels_are_the_ops_cuda_implementations():
    """What torch.compile sees is the op; the kernel behind it is registered for CUDA tensors."""
    pytest.importorskip("triton")
    code = (
        "import torch, fastadapt.backends.triton as t\n"
        "for op in ('bottleneck', 'add_norm', 'linear'):\n"
        "    for direction in ('forward', 'backward'):\n"
        "        name = f'{op}_{direction}'\n"
        "        assert torch._C._dispatch_has_kernel_for_dispatch_key(f'fastadapt::{name}', 'CUDA'), name\n"
        "        assert getattr(t, name) is getattr(torch.ops.fastadapt, name), name\n"
    )
    done = _python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def test_the_reference_keeps_its_arguments_dtypes_under_autocast():
    """A backend may make a step of an op in float32 that autocast would make in bfloat16."""
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    plain = dispatch.kernel("reference", "linear_forward")(x, [w], [None], "none", 0.0, None, False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = dispatch.kernel("reference", "linear_forward")(x, [w], [None], "none", 0.0, None, False)[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


@pytest.mark.skipif(isinstance(dispatch.load("cpu"), str), reason="the C++ kernels are not compiled")
def test_the_instruction_set_that_runs_is_the_fastest_here():
    done = _python(
        "from fastadapt import dispatch\n"
        "cpu = dispatch.load('cpu')\n"
        "with cpu.capability() as runs: print(runs, *cpu.capabilities())",
        FASTADAPT_CPU="",
    )
    runs, *found, emulated = done.stdout.split()
    slow_pairs = found[-1] == "avx512_bf16" and "Intel" in cpu_model()
    assert emulated == "amx_emulated" and runs == ("avx512" if slow_pairs else found[-1])


@pytest.mark.parametrize(
    ("extensions", "model", "fast"),
    [
        (["avx2", "avx512_f"], "Intel(R) Xeon(R)", False),
        (["avx2", "avx512_f", "avx512_bf16"], "Intel(R) Xeon(R)", False),
        (["avx2", "avx512_f", "avx512_bf16", "amx_bf16"], "Intel(R) Xeon(R)", True),
        (["avx2", "avx512_f", "avx512_bf16"], "AMD EPYC", True),
    ],
)
def test_bfloat16_is_taken_where_its_products_are_faster(monkeypatch, extensions, model, fast):
    monkeypatch.setattr(environment, "cpu_extensions", lambda: extensions)
    monkeypatch.setattr(environment, "cpu_model", lambda: model)
    assert environment.multiplies_bf16_fast() == fast
    assert _fast_dtype("cpu") == ("bf16" if fast else "fp32")
