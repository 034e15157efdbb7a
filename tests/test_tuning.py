"""Tuned launches: the table, what it changes, and the choice among candidates; timing is the GPU suite's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastadapt as fa

pytest.importorskip("triton")

from fastadapt import tuning
from fastadapt.backends.triton import launch, tuned

TILE = launch.RowTile(32, 64, 8, 2)


def test_a_table_is_read_as_it_was_written_and_joins_what_was_there(tmp_path):
    file = tmp_path / "deep" / "tuned.json"
    assert tuned.read(file) == {}
    tuned.write(file, "A", {"bottleneck_rows": {"k": tuned.entry(TILE)}})
    tuned.write(file, "B", {"linear_product": {"k": tuned.entry(launch.MatrixTile(64, 64, 32, 8, 4, 2))}})
    tuned.write(file, "A", {"bottleneck_rows": {"l": tuned.entry(replace(TILE, warps=4))}})
    found = tuned.read(file)
    assert set(found) == {"A", "B"} and set(found["A"]["bottleneck_rows"]) == {"k", "l"}
    assert tuned.tile(launch.RowTile, found["A"]["bottleneck_rows"]["k"], None) == TILE
    assert [p.name for p in file.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 2, "devices": {}}', '{"format": 1}', '{"format": 1, "devices": {"A": 3}}',
     '{"format": 1, "devices": {"A": {"h": {"k": {"rows": "x"}}}}}',
     '{"format": 1, "devices": {"A": {"h": {"k": {"rows": 0}}}}}'],
)  # fmt: skip
def test_a_broken_table_is_named(tmp_path, text):
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="tuned.json"):
        tuned.read(file)
    with pytest.raises(ValueError, match="tuned.json"):
        tuned.write(file, "A", {})
    assert file.read_text() == text


def test_a_tuned_launch_is_taken_on_its_device_at_its_shapes_alone(monkeypatch):
    arch = replace(launch.SM_90, device="A")
    honest = launch.bottleneck_rows(launch.SM_90, 4096, 64, 2, 2, backward=False)
    key = tuned.key({"rows": 4096, "bottleneck": 64, "bytes_": 2, "weight_bytes": 2, "backward": False})
    monkeypatch.setattr(launch, "TUNED", {"A": {"bottleneck_rows": {key: tuned.entry(TILE)}}})
    assert honest != TILE
    for rows in (2049, 3000, 4096):
        assert launch.bottleneck_rows(arch, rows, 64, 2, 2, backward=False) == TILE
    for given, changed in (
        ((launch.SM_90, 4096, 64, 2, 2), False), ((arch, 2048, 64, 2, 2), False), ((arch, 4097, 64, 2, 2), False),
        ((arch, 4096, 48, 2, 2), False), ((arch, 4096, 64, 2, 4), False), ((arch, 4096, 64, 2, 2), True),
    ):  # fmt: skip
        got = launch.bottleneck_rows(*given, backward=changed)
        assert got == launch.bottleneck_rows(launch.SM_90, *given[1:], backward=changed) != TILE
    # An entry with other fields is of another release.
    monkeypatch.setattr(launch, "TUNED", {"A": {"bottleneck_rows": {key: {"rows": 16}}}})
    assert launch.bottleneck_rows(arch, 4096, 64, 2, 2, backward=False) == honest


def test_the_backend_reads_the_table_when_it_is_loaded(tmp_path):
    file = tmp_path / "tuned.json"
    tuned.write(file, "A", {"bottleneck_rows": {"k": tuned.entry(TILE)}})
    code = "from fastadapt.backends.triton import launch; print(launch.TUNED['A']['bottleneck_rows']['k']['rows'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTADAPT_TUNED": str(file)}, capture_output=True, text=True
    )
    assert done.stdout == "32\n", done.stderr


def test_the_table_lies_among_the_users_configuration(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTADAPT_TUNED", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuned.path() == tmp_path / "fastadapt" / "tuned.json"
    monkeypatch.setenv("FASTADAPT_TUNED", "here.json")
    assert str(tuned.path()) == "here.json"


def test_candidates_have_no_more_rows_than_there_are():
    found = list(tuning.candidates(TILE, 20))
    assert found[0] == TILE and len(set(found)) == len(found) > 8
    assert {tile.rows for tile in found} == {16, 32}


class RefusedError(Exception):
    pass


RefusedError.__name__ = "OutOfResources"


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
@pytest.mark.parametrize("number", range(5))
def test_the_fastest_right_launch_is_chosen(number, monkeypatch):
    """In the interpreter, with times that are made up: who wins, and who is left out."""
    name, heuristic, run = list(tuning.jobs(20, 32, 8, 40, torch.float32, "cpu"))[number]
    with fa.backend("reference"):
        exact = run(torch.float64).detach()
    seen = []

    def measure(call):
        call()
        tile = launch._forced[heuristic]
        seen.append(tile)
        return 10.0 - tile.warps - tile.stages if tile.rows == 16 else 20.0

    def once():
        tile = launch._forced.get(heuristic)
        if tile is not None and tile.warps == 8 and tile.stages == 4:
            raise RefusedError("shared memory")
        y = run(torch.float32).detach()
        return y + 1 if tile is not None and tile.warps == 8 and tile.stages == 3 else y

    with fa.backend("triton"):
        found = tuning.tune(heuristic, 20, once, exact, measure=measure)
    assert found.heuristic == heuristic and "rows=32" in found.key, name
    assert (found.chosen.rows, found.chosen.warps, found.chosen.stages) == (16, 8, 2)
    assert found.tried == len(seen) and not any(t.warps == 8 and t.stages >= 3 for t in seen)
    assert not launch._forced and found.chosen_us == 0.0 and found.default_us > found.chosen_us


def test_a_small_gain_leaves_the_heuristics_launch():
    name, heuristic, run = next(iter(tuning.jobs(20, 32, 8, 4, torch.float32, "cpu")))
    with fa.backend("reference"):
        exact = run(torch.float64)
    with fa.backend("triton"):
        found = tuning.tune(heuristic, 20, lambda: run(torch.float32), exact,
                            measure=lambda call: 0.99 if launch._forced[heuristic].rows == 16 else 1.0)  # fmt: skip
    assert found.chosen == found.default, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "fastadapt", "tune", "--out", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    said = "tune: measures kernels on an NVIDIA GPU, and this torch can use none here"
    assert done.stderr == f"fastadapt: error: {said}\n"
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_json_that_says_what_it_is(tmp_path):
    tuned.write(tmp_path / "t.json", "A", {})
    assert json.loads((tmp_path / "t.json").read_text()) == {"format": 1, "devices": {"A": {}}}
