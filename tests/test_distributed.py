"""Two gloo processes train as one with the joint batch, and send nothing but the adaptation's gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import fastadapt as fa
from fastadapt.cli import main
from tests.test_loops import adapted, examples, stacked

WORLD = 2
STEPS = 3
# Methods whose forward draws nothing with dropout off, so that two halves of a batch are the whole of it.
METHODS = ("houlsby", "pfeiffer", "lora", "bitfit", "mam", "fusion")
DROPPED = ("drop", "drop_rows")


def full_rows() -> list[dict[str, torch.Tensor]]:
    return [{**row, "attention_mask": torch.ones_like(row["attention_mask"])} for row in examples(8 * STEPS)]


def own_loop(model: nn.Module, wrapped: nn.Module, rows: list[Any], per_step: int, seed: int = 0) -> list[float]:
    """SGD over ``rows``, ``per_step`` a step; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for at in range(0, len(rows), per_step):
        torch.manual_seed(seed + at)
        optimizer.zero_grad()
        loss = wrapped(**stacked(rows[at : at + per_step])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def count_bytes(wrapped: DistributedDataParallel) -> list[int]:
    """The bytes of every bucket that goes on the wire from now on."""
    sent: list[int] = []

    def hook(state, bucket):  # DDP takes annotations for wrong that are strings
        buffer = bucket.buffer()
        sent.append(buffer.numel() * buffer.element_size())
        averaged = buffer / dist.get_world_size()
        return dist.all_reduce(averaged, async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, hook)
    return sent


def in_ddp(method: str, rank: int, **options: Any) -> dict[str, Any]:
    model = adapted(method, dropout=0.0)
    wrapped = DistributedDataParallel(model, **options)
    sent = count_bytes(wrapped)
    mine = full_rows()[rank::WORLD]
    seen: list[int] = []
    step = next((p.step for p in model.fastadapt["task"].parts().values() if p.step is not None), None)
    if step is not None:
        model.bert.register_forward_hook(lambda *_: seen.append(step.turn.first))
    # With seeds of their own the ranks would draw different layers, were they not told what rank 0 drew.
    losses = own_loop(model, wrapped, mine, 4, seed=100 * rank)
    return {"losses": losses, "sent": sum(sent), "trained": trained_bytes(model), "first": seen,
            "state": {name: p.detach() for name, p in model.named_parameters()}}  # fmt: skip


def in_trainer(folder: Path, **options: Any) -> tuple[nn.Module, Trainer]:
    model = adapted("houlsby", dropout=0.0)
    defaults = {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
                "use_cpu": True, "disable_tqdm": True, "optim": "sgd",
                # BERT's loss is a mean over rows; transformers 5 takes it for a sum over tokens of all processes.
                "average_tokens_across_devices": False}  # fmt: skip
    trainer = Trainer(model, TrainingArguments(str(folder), **{**defaults, **options}), train_dataset=full_rows())
    trainer.train()
    return model, trainer


def worker(rank: int, folder: Path) -> None:
    """Everything that needs two processes, in one start of them; each writes what it found."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=(folder / "port").read_text(), ACCELERATE_USE_CPU="true")  # fmt: skip
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {method: in_ddp(method, rank) for method in METHODS}
    found |= {method: in_ddp(method, rank, find_unused_parameters=True) for method in DROPPED}
    model, trainer = in_trainer(folder / "trainer", per_device_train_batch_size=4)
    found["trainer"] = {
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "world": trainer.args.world_size,
        "state": {name: p.detach() for name, p in model.named_parameters()},
    }
    if trainer.is_world_process_zero():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AdapterHub has no place for the LayerNorms
            fa.save(model, folder / "saved", name="task")
    dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """(the folder, what each of the two processes found)."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "port").write_text(str(free_port()))
    mp.spawn(worker, args=(folder,), nprocs=WORLD)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol=2e-5, atol=2e-6) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method, ranks):
    """The mean of their losses is the joint batch's, and so are all parameters after the steps."""
    model = adapted(method, dropout=0.0)
    losses = own_loop(model, model, full_rows(), 8)
    first, second = (found[method] for found in ranks[1])
    assert [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)] == pytest.approx(losses, 1e-5)
    assert first["losses"] != second["losses"]  # each had rows of its own
    assert_same(first["state"], {name: p.detach() for name, p in model.named_parameters()})
    assert_same(second["state"], first["state"])


@pytest.mark.parametrize("method", (*METHODS, *DROPPED))
def test_only_the_adaptation_is_on_the_wire(method, ranks):
    for found in ranks[1]:
        assert found[method]["sent"] == STEPS * found[method]["trained"] > 0


@pytest.mark.parametrize("method", DROPPED)
def test_ranks_drop_alike_and_stay_alike(method, ranks):
    first, second = (found[method] for found in ranks[1])
    assert first["first"] == second["first"] and len(first["first"]) == STEPS
    assert method != "drop" or len(set(first["first"])) > 1
    assert_same(second["state"], first["state"])


def test_trainer_in_two_processes(ranks, tmp_path):
    folder, found = ranks
    model, trainer = in_trainer(tmp_path, per_device_train_batch_size=8)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for each in found:
        assert each["trainer"]["world"] == WORLD
        assert_same(each["trainer"]["state"], {name: p.detach() for name, p in model.named_parameters()})
    assert found[0]["trainer"]["losses"] == pytest.approx(losses, abs=1e-4)  # Trainer rounds what it logs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = fa.load(adapted("houlsby", dropout=0.0, seed=4), folder / "saved", name="again")
    state = {name: p.detach() for name, p in loaded.fastadapt["again"].named_parameters()}
    assert_same(state, {name: p.detach() for name, p in model.fastadapt["task"].named_parameters()})


# -- fastadapt train under torchrun --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A base without dropout, which two processes would draw differently, and two tasks of unequal width."""
    where = tmp_path_factory.mktemp("room")
    tasks.make_base(where / "bert")
    config = json.loads((where / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (where / "bert" / "config.json").write_text(json.dumps(config))
    for write, name in ((tasks.write_mood, "mood"), (tasks.write_topic, "topic")):
        write(where, name, 64, 0)
        write(where, f"{name}-dev", 32, 1)  # a batch of 16 each: Trainer weighs losses by batches
    return where


def command(room: Path, output: Path, *argv: str) -> list[str]:
    files = ["--task", f"mood={room}/mood.tsv", "--dev", f"mood={room}/mood-dev.tsv", "--task",
             f"topic={room}/topic.tsv", "--dev", f"topic={room}/topic-dev.tsv", "--text", "topic=2", "--label",
             "topic=1"]  # fmt: skip
    how = ["--method", "houlsby", "--bottleneck", "8", "--epochs", "2", "--batch", "8", "--lr", "1e-2", "--dtype",
           "fp32", "--device", "cpu", "--threads", "1", "--seeds", "0"]  # fmt: skip
    return ["train", "--model", str(room / "bert"), *files, *how, "--output", str(output), *argv]


def test_the_command_under_torchrun(room):
    """Two tasks in two processes: losses, scores and folders of one process that accumulates two batches a step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([*launch, "-m", "fastadapt", *command(room, room / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("use it") == 1  # one of the processes speaks
    assert main(command(room, room / "one", "--accumulate", "2")) == 0
    two, one = (json.loads((room / name / "report.json").read_text()) for name in ("two", "one"))
    for (step, loss), (expected_step, expected) in zip(two["stages"][0]["loss"], one["stages"][0]["loss"], strict=True):
        assert step == expected_step and loss == pytest.approx(expected, abs=1e-5)
    for name in ("mood", "topic"):
        assert two["tasks"][name]["scores"]["0"] == pytest.approx(one["tasks"][name]["scores"]["0"], abs=1e-4)
        kept, expected = (load_file(room / run / name / "adapter.safetensors") for run in ("two", "one"))
        assert_same(dict(sorted(kept.items())), dict(sorted(expected.items())), rtol=1e-3, atol=1e-4)
    assert main([*command(room, room / "two"), "--resume"]) == 2  # another number of processes has other numbers
