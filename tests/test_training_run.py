"""``fastadapt train``: what a run leaves behind, for one task and several, and that predict needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tasks
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt.cli import main
from fastadapt.training import base, folder

FAST = ("--epochs", "3", "--batch", "16", "--lr", "1e-2", "--dtype", "fp32", "--device", "cpu")
ONE = ("--seeds", "0")


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A base and the files of three tasks."""
    where = tmp_path_factory.mktemp("room")
    tasks.make_base(where / "bert")
    for write, name in ((tasks.write_mood, "mood"), (tasks.write_topic, "topic"), (tasks.write_pairs, "pairs")):
        write(where, name, 96, 0)
        write(where, f"{name}-dev", 48, 1)
    return where


def run(room: Path, *argv: str) -> int:
    return main(["train", "--model", str(room / "bert"), *FAST, *ONE, *argv])


def mood(room: Path) -> list[str]:
    return ["--train", str(room / "mood.tsv"), "--dev", str(room / "mood-dev.tsv")]


def report_of(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def predicted(room: Path, output: Path, *argv: str) -> list[dict]:
    target = output.parent / "out.jsonl"
    assert main(["predict", "--device", "cpu", "--output", str(target), *argv]) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("houlsby", ["--bottleneck", "8"]),
        ("houlsby", ["--dtype", "bf16"]),
        ("pfeiffer", []),
        ("parallel", []),
        ("lora", ["--targets", "all", "--set", "dropout=0.1"]),
        ("bitfit", []),
        ("prefix", ["--length", "4", "--bottleneck", "16"]),
        ("mam", ["--length", "4", "--bottleneck", "8"]),
        ("masked", ["--bottleneck", "8", "--set", "mask_prob=0.1"]),
        ("adapterdrop", ["--set", "drop=mode=independent,p=0.2"]),
        ("layernorm", []),
        ("head", []),
        ("full", []),
    ],
)
def test_every_method_learns_and_its_folder_predicts_the_same(room, tmp_path, capsys, method, extra):
    output = tmp_path / method
    assert run(room, *mood(room), "--method", method, *extra, "--output", str(output)) == 0
    report = report_of(output)
    task = report["tasks"][method]
    assert task["labels"] == ["0", "1"] and task["metric"] == "accuracy" and task["config" if extra else "kind"]
    losses = [loss for _, loss in report["stages"][0]["loss"]]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert task["mean"] > 0.8
    if method != "full":
        assert report["base_checksum"]["before"] == report["base_checksum"]["after"]
    text = capsys.readouterr().out
    assert method in text and str(output) in text
    assert not list((output / "checkpoints").rglob("checkpoint-*"))

    rows = predicted(room, output, "--adapters", str(output), "--input", str(room / "mood-dev.tsv"))
    truth = [line.split("\t")[1] for line in (room / "mood-dev.tsv").read_text().splitlines()[1:]]
    right = sum(row["label"] == label for row, label in zip(rows, truth, strict=True)) / len(truth)
    assert right == pytest.approx(task["scores"]["0"]["accuracy"])
    assert all(sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-6) for row in rows)


def test_the_best_of_several_seeds_is_kept(room, tmp_path):
    output = tmp_path / "mood"
    by_default = ["train", "--model", str(room / "bert"), *FAST, *mood(room), "--epochs", "1", "--output", str(output)]
    assert main(by_default) == 0
    task = report_of(output)["tasks"]["mood"]
    scores = {seed: s["score"] for seed, s in task["scores"].items()}
    assert set(scores) == {"0", "1", "2"}
    assert scores[str(task["best_seed"])] == max(scores.values())
    assert task["mean"] == pytest.approx(sum(scores.values()) / 3)
    best = output / "seeds" / str(task["best_seed"]) / "mood"
    for name in ("adapter.safetensors", "model_head.safetensors", "task.json"):
        assert (output / name).read_bytes() == (best / name).read_bytes()
    first, second = (load_file(output / "seeds" / s / "mood" / "adapter.safetensors") for s in "01")
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_a_regression_of_two_texts(room, tmp_path):
    output = tmp_path / "pairs"
    files = ["--train", str(room / "pairs.jsonl"), "--dev", str(room / "pairs-dev.jsonl")]
    columns = ["--text", "first", "--text2", "second", "--label", "score"]
    assert run(room, *files, *columns, "--method", "lora", "--output", str(output)) == 0
    task = report_of(output)["tasks"]["pairs"]
    assert task["kind"] == "regression" and task["metric"] == "spearman" and task["labels"] == []
    rows = predicted(room, output, "--adapters", str(output), "--input", str(room / "pairs-dev.jsonl"))
    assert len(rows) == 48 and all(isinstance(row["label"], float) for row in rows)


def test_predict_reads_files_as_training_did_unless_told(room, tmp_path, capsys):
    """Latin-1 and CSV, in files whose suffix says nothing."""
    for name in ("mood", "mood-dev"):
        text = (room / f"{name}.tsv").read_text().replace("film", "café").replace("\t", ",")
        (tmp_path / f"{name}.txt").write_bytes(text.encode("latin-1"))
    output, new = tmp_path / "mood", str(tmp_path / "mood-dev.txt")
    how = ["--encoding", "latin-1", "--format", "csv"]
    files = ["--train", str(tmp_path / "mood.txt"), "--dev", new]
    assert run(room, *files, *how, "--method", "head", "--output", str(output)) == 0
    task = json.loads((output / "task.json").read_text())["task"]
    assert (task["encoding"], task["format"]) == ("latin-1", "csv")
    argv = ["--adapters", str(output), "--input"]
    rows = predicted(room, output, *argv, new)
    assert len(rows) == 48 and rows == predicted(room, output, *argv, new, *how)

    other = tmp_path / "other.csv"  # what is said wins over training's, the suffix does not
    other.write_text(Path(new).read_text(encoding="latin-1").replace(",", "\t"))
    assert predicted(room, output, *argv, str(other), "--encoding", "utf-8", "--format", "tsv") == rows
    assert main(["predict", *argv, str(other), "--encoding", "utf-8"]) == 2
    assert "no column 'sentence'" in capsys.readouterr().err
    assert main(["predict", *argv, new, "--encoding", "utf-8"]) == 2
    assert "is not utf-8" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pfeiffer", "masked"])
def test_tasks_of_unequal_heads_train_jointly_and_predict_together(room, tmp_path, capsys, method):
    output = tmp_path / "joint"
    tasks_ = ["--task", f"mood={room / 'mood.tsv'}", "--dev", f"mood={room / 'mood-dev.tsv'}"]
    tasks_ += ["--task", f"topic={room / 'topic.tsv'}", "--dev", f"topic={room / 'topic-dev.tsv'}"]
    tasks_ += ["--task", f"again={room / 'mood.tsv'}", "--dev", f"again={room / 'mood-dev.tsv'}"]
    columns = ["--text", "topic=2", "--label", "topic=1", "--text", "sentence", "--label", "label"]
    assert run(room, *tasks_, *columns, "--method", method, "--bottleneck", "8", "--output", str(output)) == 0
    report = report_of(output)
    assert list(report["tasks"]) == ["mood", "topic", "again"] and len(report["stages"]) == 1
    assert all(task["mean"] > 0.8 for task in report["tasks"].values())
    size = report["size"]
    assert size["full_models_to_base"] > 2.9 and size["together_to_base"] < 1.5

    folders = [str(output / name) for name in ("mood", "topic", "again")]
    together = predicted(room, output, "--adapters", *folders, "--input", str(room / "mood-dev.tsv"))
    assert [row["task"] for row in together[:3]] == ["mood", "topic", "again"] and len(together) == 3 * 48
    for name in ("mood", "topic", "again"):
        alone = predicted(room, output, "--adapters", str(output / name), "--input", str(room / "mood-dev.tsv"),
                          "--text", "sentence")  # fmt: skip
        mine = [row for row in together if row["task"] == name]
        for one, other in zip(mine, alone, strict=True):
            assert one["label"] == other["label"]
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)

    header, *lines = (room / "mood-dev.tsv").read_text().splitlines()
    of = [("again", "topic", "mood")[i % 3] for i in range(len(lines))]
    inbox = output / "inbox.tsv"
    inbox.write_text("\n".join(["\t".join((header, "for")), *map("\t".join, zip(lines, of, strict=True))]))
    argv = ["--adapters", *folders, "--input", str(inbox), "--task-column", "for"]
    asked = predicted(room, output, *argv)
    assert [row["task"] for row in asked] == of and [row["row"] for row in asked] == list(range(1, 49))
    expected = {(row["row"], row["task"]): row for row in together}
    for row in asked:
        same = expected[row["row"], row["task"]]
        assert row["label"] == same["label"]
        assert row["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)

    inbox.write_text(inbox.read_text().replace("\ttopic", "\tweather"))
    assert main(["predict", *argv]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "inbox.tsv, line 3, column 'for'" in line and "'weather'" in line and "'mood', 'topic', 'again'" in line
    assert main(["predict", *argv[:-1], "who"]) == 2
    assert "no column 'who' (--task-column)" in capsys.readouterr().err


def test_tasks_one_after_another_leave_earlier_ones_and_the_base_alone(room, tmp_path):
    both = ["--task", f"mood={room / 'mood.tsv'}", "--dev", f"mood={room / 'mood-dev.tsv'}"]
    both += ["--task", f"topic={room / 'topic.tsv'}", "--dev", f"topic={room / 'topic-dev.tsv'}"]
    both += ["--text", "topic=2", "--label", "topic=1"]
    output, alone = tmp_path / "both", tmp_path / "alone"
    assert run(room, *both, "--one-by-one", "--output", str(output)) == 0
    assert run(room, *mood(room), "--name", "mood", "--output", str(alone)) == 0
    report = report_of(output)
    assert report["base_checksum"]["before"] == report["base_checksum"]["after"]
    assert report["tasks"]["mood"]["checksum"] == report_of(alone)["tasks"]["mood"]["checksum"]
    for name in ("adapter.safetensors", "fastadapt.safetensors", "model_head.safetensors"):
        assert (output / "mood" / name).read_bytes() == (alone / name).read_bytes()
    text = (output / "report.md").read_text()
    assert "the same" in text and report["tasks"]["topic"]["checksum"] in text


def test_a_fusion_trains_its_adapters_first(room, tmp_path):
    both = ["--task", f"mood={room / 'mood.tsv'}", "--dev", f"mood={room / 'mood-dev.tsv'}"]
    both += ["--task", f"topic={room / 'topic.tsv'}", "--dev", f"topic={room / 'topic-dev.tsv'}"]
    both += ["--text", "topic=2", "--label", "topic=1", "--bottleneck", "8"]
    output = tmp_path / "fused"
    assert run(room, *both, "--method", "fusion", "--output", str(output)) == 0
    report = report_of(output)
    assert list(report["tasks"]) == ["mood", "topic", "mood_fusion", "topic_fusion"]
    assert report["tasks"]["mood_fusion"]["mean"] > 0.8
    rows = predicted(room, output, "--adapters", str(output / "mood_fusion"), "--input", str(room / "mood-dev.tsv"))
    truth = [line.split("\t")[1] for line in (room / "mood-dev.tsv").read_text().splitlines()[1:]]
    right = sum(row["label"] == label for row, label in zip(rows, truth, strict=True)) / len(truth)
    assert right == pytest.approx(report["tasks"]["mood_fusion"]["mean"])

    more = tmp_path / "more"  # a mix of adapters that are there
    argv = ["--method", "fusion", "--adapters", str(output / "mood"), str(output / "topic"), "--name", "third"]
    assert run(room, *mood(room), *argv, "--output", str(more)) == 0
    assert (more / "adapters" / "topic" / "adapter.safetensors").is_file()


def test_what_the_base_lacks_is_kept_with_the_result(room, tmp_path):
    bare = tasks.make_base(tmp_path / "bare", pooler=False)
    output = tmp_path / "mood"
    argv = ["train", "--model", str(bare), *FAST, *ONE, *mood(room), "--output", str(output)]
    assert main(argv) == 0
    saved = folder.read(output)
    assert saved.extra == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    model = folder.open_base(saved, output, None)
    stored = load_file(output / "base_extra.safetensors")
    assert torch.equal(model.bert.pooler.dense.weight, stored["bert.pooler.dense.weight"])


def test_the_folders_load_in_peft_and_adapterhub(room, tmp_path):
    peft = pytest.importorskip("peft")
    output = tmp_path / "mood"
    assert run(room, *mood(room), "--method", "lora", "--output", str(output)) == 0
    saved = folder.read(output)
    plain, _ = base.load_model(str(room / "bert"), 2)
    ours = folder.open_base(saved, output, None)
    folder.load(ours, output, saved, "mood")
    theirs = peft.PeftModel.from_pretrained(plain, str(output)).eval()
    inputs = {"input_ids": torch.randint(4, 20, (3, 7))}
    with torch.no_grad():
        expected, got = theirs(**inputs).logits, ours.eval()(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_folder_loads_in_adapterhub(room, tmp_path):
    adapters = pytest.importorskip("adapters")
    output = tmp_path / "mood"
    assert run(room, *mood(room), "--method", "pfeiffer", "--output", str(output)) == 0
    saved = folder.read(output)
    plain, _ = base.load_model(str(room / "bert"), 2)
    adapters.init(plain)
    name = plain.load_adapter(str(output), use_safetensors=True)
    plain.set_active_adapters(name)
    ours = folder.open_base(saved, output, None)
    folder.load(ours, output, saved, "mood")
    inputs = {"input_ids": torch.randint(4, 20, (3, 7))}
    with torch.no_grad():
        expected, got = plain.eval()(**inputs).logits, ours.eval()(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_another_base_is_refused(room, tmp_path, capsys):
    output = tmp_path / "mood"
    assert run(room, *mood(room), "--epochs", "1", "--output", str(output)) == 0
    other = tasks.make_base(tmp_path / "other", seed=5)
    capsys.readouterr()
    argv = ["predict", "--adapters", str(output), "--model", str(other), "--input", str(room / "mood-dev.tsv")]
    assert main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--model" in line and "other weights" in line


def test_groups_of_parameters():
    import tiny

    model = fa.adapt(tiny.make(), fa.HoulsbyConfig(bottleneck=4), name="norm")
    groups = fa.param_groups(model, lr=1e-3, head_lr=5e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0), (5e-3, 0.1), (5e-3, 0.0)]
    trained = [p for p in model.parameters() if p.requires_grad]
    grouped = [p for g in groups for p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained} and len(grouped) == len(trained)
    assert all(p.dim() == 2 for p in groups[0]["params"])  # no LayerNorm, no bias
    assert {p.shape for p in groups[2]["params"]} == {model.fastadapt["norm"].own_head().weight.shape}
    for bad in ({"lr": -1.0}, {"lr": "1"}, {"lr": 1e-3, "head_lr": float("nan")}):
        with pytest.raises(ValueError, match="accepted is a number"):
            fa.param_groups(model, **bad)
    with pytest.raises(ValueError, match="known are 'norm'"):
        fa.param_groups(model, lr=1e-3, names=["other"])
    fa.activate(model, None)
    with pytest.raises(ValueError, match="nothing that trains"):
        fa.param_groups(model, lr=1e-3)
    assert len(fa.param_groups(model, lr=1e-3, names=["norm"])) == 4
