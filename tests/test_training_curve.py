"""Training in the fused sublayers has the reference's loss curve: the same batches, dropout and steps."""

from __future__ import annotations

import tasks

from benchmarks.loss_curve import LIMIT, curve, largest_difference
from fastadapt.training.data import Source
from fastadapt.training.recipe import Size


def test_200_steps_have_the_references_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what a training in bfloat16 leaves to those after it
    bert = tasks.make_base(tmp_path / "bert", taught=False)
    source = Source(tasks.write_mood(tmp_path, "mood", 400, 0))
    fused, reference = (
        curve(str(bert), source, "houlsby", Size(), 200, 1e-3, backend) for backend in (None, "reference")
    )
    assert len(fused) == 200 and min(fused) < 0.9 * fused[0]  # it learns, so steps build on each other
    worst, step = largest_difference(fused, reference)
    assert worst <= LIMIT, f"{worst} at step {step}"
