"""What commands print: tables, and where a run stands."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO


def table(headers: Sequence[str], rows: Sequence[Sequence[str] | None]) -> str:
    """Aligned text, the first column to the left and the others to the right; a None row is a rule."""
    filled = [row for row in rows if row is not None]
    widths = [max(len(line[i]) for line in (headers, *filled)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(headers), rule, *(rule if row is None else line(row) for row in rows)])


def megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f}"


class Progress:
    """Where a run stands, on stderr: one line that rewrites itself on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.started = time.perf_counter()
        self._width = 0

    def step(self, text: str) -> None:
        """A stage begins; stays on the screen."""
        self._show(f"[{time.perf_counter() - self.started:6.1f} s] {text}", end="\n")

    def tick(self, text: str) -> None:
        """Something moves within a stage; terminals only."""
        if self.live:
            self._show(f"           {text}", end="\r")

    def _show(self, text: str, end: str) -> None:
        self.stream.write(text.ljust(self._width) + end)
        self.stream.flush()
        self._width = len(text) if end == "\r" else 0
