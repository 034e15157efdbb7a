"""Models of every method under torch.compile and torch.export, whole; and no step waits for a value."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fastadapt as fa
from tests.tiny import (
    METHODS,
    BertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
    batch,
    make,
    output,
    shake,
)

ROOT = Path(__file__).parents[1]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
EVERY = {
    **METHODS,
    "gate": fa.BottleneckConfig(bottleneck=8, gate=True),
    "lora": fa.LoRAConfig(r=4),
    "dora": fa.LoRAConfig(r=4, dora=True),
    "bitfit": fa.BitFitConfig(),
    "layer norms": fa.LayerNormConfig(),
    "prefix": fa.PrefixConfig(length=3, bottleneck=4),
    "mam": fa.MAMConfig(fa.PrefixConfig(length=3, flat=True), fa.ParallelConfig(bottleneck=8)),
    "masked": fa.MaskedAdapterConfig(bottleneck=8),
    "drop": fa.HoulsbyConfig(bottleneck=8, drop=fa.AdapterDrop(mode="specialised", n=1)),
}
WHOLE = [*EVERY, "fusion", "merged", "routed"]


def adapted(method, model_class=BertForSequenceClassification):
    """(a model, the context in which it runs)."""
    model, context = make(model_class, num_hidden_layers=2), nullcontext()
    if method in EVERY:
        fa.adapt(model, EVERY[method])
    elif method == "fusion":
        for name in "ab":
            fa.adapt(model, METHODS["pfeiffer"], name=name)
        fa.adapt(model, fa.FusionConfig(["a", "b"]), name="mix")
    else:
        fa.adapt(model, fa.LoRAConfig(r=4), name="lora")
        fa.adapt(model, METHODS["houlsby"], name="houlsby")
    for name in fa.adaptations(model):
        shake(model.fastadapt[name])
    if method == "merged":
        fa.merge(model, "lora")
    elif method == "routed":
        context = fa.route(model, ["houlsby", None, "lora"])
    return model.eval(), context


@pytest.mark.parametrize("method", WHOLE)
def test_exports_with_any_batch_and_length(method):
    model, context = adapted(method)
    inputs = batch(model)
    rows = {} if method == "routed" else {0: torch.export.Dim("rows", max=64)}
    length = torch.export.Dim("length", min=2, max=40)
    shapes = {key: {**rows, 1: length} for key in inputs}
    with torch.no_grad(), context:
        exported = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, **CLOSE)
        if method == "routed":
            other = {n: t[:, :7] for n, t in inputs.items()}
        else:
            other = {n: torch.cat([t, t])[:5, :7] for n, t in inputs.items()}
        torch.testing.assert_close(exported(**other).logits, model(**other).logits, **CLOSE)


@pytest.mark.parametrize("method", WHOLE)
def test_compiles_without_a_break(method):
    model, context = adapted(method)
    inputs = batch(model)
    with torch.no_grad(), context:
        want = model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, want, **CLOSE)


def test_what_is_compiled_before_it_ever_ran_has_no_break():
    code = (
        "import torch, fastadapt as fa\n"
        "from tests.tiny import batch, make\n"
        "model = fa.adapt(make(num_hidden_layers=1), fa.HoulsbyConfig(bottleneck=8)).eval()\n"
        "with torch.no_grad():\n"
        "    torch.compile(model, backend='eager', fullgraph=True)(**batch(model))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "model_class"),
    [("houlsby", BertForSequenceClassification), ("lora", RobertaForSequenceClassification),
     ("fusion", ElectraForSequenceClassification)],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)  # fmt: skip
def test_compiles_under_max_autotune(method, model_class):
    model, _ = adapted(method, model_class)
    want = output(model)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            got = torch.compile(model, mode="max-autotune", fullgraph=True)(**batch(model)).logits
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(got, want, **CLOSE)


STEP = """
import contextlib
import torch, transformers
import fastadapt as fa
from fastadapt import dispatch
import fastadapt.backends.triton as triton_backend
from tests.test_whole_graphs import EVERY
from tests.tiny import make

honest = triton_backend.refusal
def refusal(op, device_type, dtype, facts):  # meta tensors are told what tensors on a GPU are
    if op.startswith("attention") or op == "drop":
        return honest(op, "cuda", dtype, facts)
triton_backend.refusal = refusal
dispatch.PREFERENCE["meta"] = dispatch.PREFERENCE["cuda"]
torch.is_autocast_enabled = lambda *_: False  # knows no meta tensors
torch.autocast = lambda *_, **__: contextlib.nullcontext()

seen = set()
class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastadapt":
            seen.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))

for method, config in {**EVERY, "fusion": None, "routed": None}.items():
    if method == "drop":
        continue
    with torch.device("meta"):
        model = make(num_hidden_layers=2)
        if config is not None:
            fa.adapt(model, config)
        else:
            for name in "ab":
                fa.adapt(model, EVERY["pfeiffer"], name=name)
            if method == "fusion":
                fa.adapt(model, fa.FusionConfig(["a", "b"]), name="mix")
        model.train()
        ids = torch.ones(4, 12, dtype=torch.int64)
        # Masks as transformers has them in a capture, where it does not look at their values.
        shape, kind = ((4, 1, 12, 12), torch.bool) if transformers.__version__ >= "5" else ((4, 12, 12), torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=kind)}
        def step():
            logits = model(**inputs).logits
            wanted = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(logits.float().sum(), wanted, allow_unused=True)
            assert logits.is_meta and any(g is not None for g in grads), method
        with Ops():
            if method == "routed":
                with fa.route(model, ["a", None, "b", "a"]):
                    step()
            else:
                step()
for op in ("bottleneck", "bottleneck_rows", "lora", "linear", "add_norm", "mix"):
    for direction in ("forward", "backward"):
        assert f"{op}_{direction}" in seen, (op, direction, seen)
print("no value was asked for")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU; the GPU suite captures steps there")
def test_a_training_step_on_a_gpu_waits_for_no_value():
    """On meta tensors, which have no values, through the ops that a GPU would run: to read one on the host raises."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "no value was asked for\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("method", ["houlsby", "lora", "bitfit", "mam"])
def test_trains_inside_graphed_callables(method):
    """Gradients of two batches through one captured step are those of a model that launches its kernels one by one."""
    model, _ = adapted(method)
    model.cuda().train()
    for module in model.modules():  # without dropout both draw nothing
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    plain = copy.deepcopy(model)
    first = {key: value.cuda() for key, value in batch(model).items()}
    second = first | {"input_ids": first["input_ids"].flip(0)}

    class Logits(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *values):
            return self.inner(**dict(zip(first, values, strict=True))).logits

    def gradients(callable_, of, inputs):
        of.zero_grad(set_to_none=True)
        callable_(*inputs.values()).float().square().sum().backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.requires_grad}

    graphed = torch.cuda.make_graphed_callables(Logits(model), tuple(first.values()), allow_unused_input=True)
    for inputs in (first, second):
        want, got = gradients(Logits(plain), plain, inputs), gradients(graphed, model, inputs)
        assert want.keys() == got.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-4, msg=name)
