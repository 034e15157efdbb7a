"""What is seen of a training run while it goes."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from fastadapt.console import Progress
from fastadapt.errors import UserError


class Schedule(TrainerCallback):
    """Evaluates after the last step too, logs wherever a checkpoint is written (so that no step's loss is between two
    logs when a run is resumed), and stops at a loss that is no number."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log = control.should_log or control.should_save or control.should_evaluate
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.global_step}; a smaller --lr trains")


class Watch(TrainerCallback):
    """Progress, and the time of the steps."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss: float | None = None
        self.seconds, self.steps, self._begun = 0.0, 0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
        self.steps += 1
        if not state.is_world_process_zero:
            return
        left = (state.max_steps - state.global_step) * self.seconds / self.steps
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        epoch = math.ceil(state.epoch or 0)
        self.progress.tick(
            f"epoch {epoch}/{state.num_train_epochs}  step {state.global_step}/{state.max_steps}  {loss}"
            f"{self.steps / self.seconds:.1f} steps/s  {int(left // 60)}:{int(left % 60):02d} left"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
