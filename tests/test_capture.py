"""Buckets on a CPU, where no graph is captured; and, with a traced graph in a CUDA graph's place, what it may hold."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.utils import import_utils

import fastadapt as fa
from fastadapt.ops import checks
from tests.tiny import (
    METHODS,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
    make,
    shake,
)

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture
def traced(request, monkeypatch):
    """With True, a graph of the ops that a forward ran: like a CUDA graph it holds tensors, no Python runs again, and
    what waits for a value cannot be captured."""

    def trace(run, device, pool):
        for _ in range(2):
            run()
        form = run()
        names = list(form.keys())
        with monkeypatch.context() as patch:
            if hasattr(import_utils, "is_cuda_stream_capturing"):  # as transformers 5 sees it where there is a GPU
                patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
            patch.setattr(checks, "rows", lambda *_: None)  # reads the table's values where it lies on a CPU
            graph = make_fx(lambda: tuple(run().to_tuple()))()
        return lambda: type(form)(**dict(zip(names, graph(), strict=True)))

    if request.param:
        capture = fa.capture

        def captured(*args, **options):
            found = capture(*args, **options)
            found.graphs = True
            return found

        monkeypatch.setattr("fastadapt.capturing._graph", trace)
        monkeypatch.setattr(fa, "capture", captured)
    return request.param


def indirect(function):
    return pytest.mark.parametrize("traced", [False, True], ids=["buckets", "traced"], indirect=True)(function)


def inputs(model, rows, length, padding=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, length) if type(model).__name__.endswith("MultipleChoice") else (rows, length)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    if padding and length > 3:
        mask[0, ..., length - 2 :] = 0
        ids = torch.where(mask == 1, ids, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def same(captured, model, given):
    with torch.no_grad():
        ours, want = captured(**given), model(**given)
    assert type(ours) is type(want) and list(ours) == list(want)
    for key in want:
        assert ours[key].shape == want[key].shape, key
        real = given["attention_mask"].bool()
        a, b = (ours[key], want[key]) if ours[key].shape[:2] != real.shape else (ours[key][real], want[key][real])
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(
    "model_class",
    [BertModel, BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering,
     BertForMultipleChoice, RobertaForSequenceClassification, ElectraForSequenceClassification],
    ids=lambda c: c.__name__,
)  # fmt: skip
def test_every_shape_up_to_the_example_gives_what_the_model_gives(model_class):
    model = make(model_class)
    if model_class is BertModel:
        fa.accelerate(model)
    else:
        fa.adapt(model, METHODS["houlsby"])
        shake(model.fastadapt["default"])
    captured = fa.capture(model.eval(), inputs(model, 5, 33))
    assert (captured.batches, captured.lengths) == ((1, 2, 4, 5), (16, 32, 33))
    for rows, length in ((5, 33), (1, 3), (2, 16), (3, 17), (5, 1), (4, 20), (1, 3)):
        same(captured, model, inputs(model, rows, length, seed=rows))
    assert captured.captures == len({(5, 33), (1, 16), (2, 16), (4, 32), (5, 16)})


@indirect
def test_a_graph_of_the_largest_bucket_serves_smaller_batches(traced):
    model = make(BertForTokenClassification)
    fa.adapt(model, METHODS["houlsby"])
    shake(model.fastadapt["default"])
    captured = fa.capture(model.eval(), inputs(model, 3, 16), batches=[3], lengths=[16])
    for rows, length in ((3, 16), (1, 7), (2, 12)):
        same(captured, model, inputs(model, rows, length, seed=rows))
    assert captured.captures == 1


@indirect
def test_without_a_mask_nothing_is_padding(traced):
    model = fa.accelerate(make())
    captured = fa.capture(model, inputs(model, 4, 32), batches=[4], lengths=[32])
    given = inputs(model, 3, 9, padding=False)
    want = model(**given).logits
    torch.testing.assert_close(captured(input_ids=given["input_ids"]).logits, want, **CLOSE)
    same(captured, model, inputs(model, 4, 32, seed=5))
    torch.testing.assert_close(captured(input_ids=given["input_ids"]).logits, want, **CLOSE)
    assert captured.captures == 1


def overwrite(weight):
    """A write that no version counter shows."""
    weight.data.copy_(weight.flip(0))
    return True


@indirect
def test_changes_of_the_model_are_followed(traced):
    model = make()
    for name, config in (("h", METHODS["houlsby"]), ("l", fa.LoRAConfig(r=4)), ("m", fa.LoRAConfig(r=2)),
                         ("a", METHODS["pfeiffer"]), ("b", METHODS["pfeiffer"])):  # fmt: skip
        fa.adapt(model, config, name=name)
        shake(model.fastadapt[name], seed=ord(name))
    fa.adapt(model, fa.FusionConfig(["a", "b"]), name="f")
    fa.adapt(model, fa.PrefixConfig(length=3, bottleneck=4), name="p")
    fa.adapt(model, fa.MaskedAdapterConfig(bottleneck=8), name="n")
    shake(model.fastadapt["n"], seed=7)
    given = inputs(model.eval(), 3, 10)
    captured = fa.capture(model, given)
    for change in (
        lambda: fa.activate(model, "h"),
        lambda: fa.activate(model, "h", skip_layers=[0]),
        lambda: fa.activate(model, None),
        lambda: fa.activate(model, ["l", "m"]),
        lambda: fa.merge(model, "l"),
        lambda: fa.swap(model, "m"),
        lambda: fa.unmerge(model),
        lambda: fa.activate(model, "f"),
        lambda: shake(model.fastadapt["f"], seed=8),
        lambda: shake(model.fastadapt["a"], seed=9),
        lambda: fa.activate(model, "p"),
        lambda: shake(model.fastadapt["p"], seed=10),
        lambda: fa.eject(model, "p"),
        lambda: fa.activate(model, "n"),
        lambda: fa.keep_neurons(model, "n", torch.arange(8) < 3),
        lambda: fa.keep_neurons(model, "n", torch.arange(8) > 5),
        lambda: overwrite(model.bert.encoder.layer[0].output.dense.weight) and fa.refresh(model),
        lambda: model.bfloat16().float(),
        lambda: fa.remove(model, "f"),
    ):
        change()
        same(captured, model, given)
    # Adaptations that take turns keep their graphs.
    for name in ("h", "l"):
        fa.activate(model, name)
        same(captured, model, given)
    count = captured.captures
    for name in ("h", "l", "h"):
        fa.activate(model, name)
        same(captured, model, given)
    assert captured.captures == count


@indirect
@pytest.mark.parametrize("kinds", [("houlsby", "houlsby"), ("houlsby", "pfeiffer")], ids=["one form", "taken apart"])
def test_routes_and_what_they_assign_are_followed(kinds, traced):
    model = make()
    for name, kind in zip("xy", kinds, strict=True):
        fa.adapt(model, METHODS[kind], name=name)
        shake(model.fastadapt[name], seed=ord(name))
    given = inputs(model.eval(), 3, 10)
    captured = fa.capture(model, given)
    same(captured, model, given)
    for names in (["x", None, "y"], ["y", "y", "x"]):
        with fa.route(model, names) as routing:
            same(captured, model, given)
            count = captured.captures
            routing.assign([names[2], names[0], names[0]])
            same(captured, model, given)
            assert captured.captures == count + (kinds[0] != kinds[1])
            with pytest.raises(ValueError, match="batch has 2 rows"):
                captured(**inputs(model, 2, 10))
        same(captured, model, given)


def test_a_gate_sees_no_padding_of_a_bucket():
    model = make()
    fa.adapt(model, fa.BottleneckConfig(bottleneck=8, gate=True))
    shake(model.fastadapt["default"])
    captured = fa.capture(model.eval(), inputs(model, 2, 32))
    for length in (10, 11, 32):
        same(captured, model, inputs(model, 2, length))
    assert captured.captures == 3


def test_on_a_cpu_there_are_no_graphs():
    model = fa.accelerate(make())
    assert fa.capture(model, inputs(model, 1, 16)).graphs is False


def test_bad_input_is_named():
    model = fa.accelerate(make())
    good = inputs(model, 2, 16)
    for error, message, arguments, options in (
        (TypeError, "example: accepted", (model, None), {}),
        (ValueError, "example: got 'labels'", (model, good | {"labels": torch.zeros(2)}), {}),
        (ValueError, "attention_mask is not", (model, good | {"attention_mask": torch.ones(2, 3)}), {}),
        (ValueError, "input_ids have shape", (model, {"input_ids": torch.ones(3).long()}), {}),
        (ValueError, "batches: got", (model, good), {"batches": [0]}),
        (ValueError, "lengths: got 41", (model, good), {"lengths": [41]}),
        (ValueError, "training mode", (make().train(), good), {}),
        (TypeError, "model: got Linear", (torch.nn.Linear(2, 2), good), {}),
    ):
        with pytest.raises(error, match=message):
            fa.capture(*arguments, **options)
    captured = fa.capture(model, good)
    for message, given in (
        ("inputs: got 3 rows", inputs(model, 3, 16)),
        ("inputs: got 2 rows of 17", inputs(model, 2, 17)),
        ("inputs: got attention_mask", {"attention_mask": good["attention_mask"]}),
        ("inputs: got input_ids, position_ids", {key: good["input_ids"] for key in ("input_ids", "position_ids")}),
        ("input_ids: got", {"input_ids": torch.ones(2, 2, 2).long()}),
        ("attention_mask: accepted", {**good, "attention_mask": torch.ones(2, 3)}),
        ("at least one token", {"input_ids": torch.ones(0, 4).long()}),
    ):
        with pytest.raises(ValueError, match=message):
            captured(**given)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        captured(**good)
