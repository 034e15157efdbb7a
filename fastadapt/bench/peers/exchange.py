"""Runtimes that take an exported model: OpenVINO and ONNX Runtime, same threads, same dtype, in this process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fastadapt.bench.peers import Inference
from fastadapt.bench.setup import Setup, threads
from fastadapt.errors import UserError


class _HiddenState(nn.Module):
    """Ids in, last hidden state out: what the exporters can trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def _traceable(setup: Setup, name: str) -> nn.Module:
    if setup.case.device != "cpu":
        raise UserError(f"{name}: measured on the CPU only; got --device {setup.case.device}")
    return _HiddenState(setup.plain().requires_grad_(False)).eval()


def openvino(setup: Setup) -> Inference:
    """The precision hint sets the dtype: weights stay float32 in the file, as OpenVINO's users keep them."""
    import openvino

    with torch.no_grad():
        converted = openvino.convert_model(_traceable(setup, "openvino"), example_input=setup.ids)
    converted.reshape(list(setup.ids.shape))
    properties = {
        "INFERENCE_NUM_THREADS": threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[setup.case.dtype],
    }
    request = openvino.Core().compile_model(converted, "CPU", properties).create_infer_request()
    ids = setup.ids.numpy()
    return Inference(lambda: request.infer([ids], share_inputs=True, share_outputs=True)[0], torch.from_numpy)


def onnxruntime(setup: Setup) -> Inference:
    import onnxruntime

    if setup.case.dtype != "fp32":
        raise UserError("onnxruntime: its CPU kernels have no bf16")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        model = _traceable(setup, "onnxruntime")
        torch.onnx.export(model, (setup.ids,), str(path), input_names=["input_ids"], dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = setup.ids.numpy()
    return Inference(lambda: session.run(None, {"input_ids": ids})[0], torch.from_numpy)
