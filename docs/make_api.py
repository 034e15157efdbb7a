"""Writes docs/api.md from the signatures and docstrings of what is public.

    python docs/make_api.py           write the page
    python docs/make_api.py --check   exit 1 where the page is not what the code says

Which section a name is in, and what the environment variables do, is said here.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import fastadapt as fa

PAGE = Path(__file__).resolve().parent / "api.md"
WIDTH = 100  # of a signature

# What each section shows, in its order; every public name is in one of them.
SECTIONS: dict[str, tuple[str, list[str]]] = {
    "Adapting and running": (
        "What takes a Hugging Face model and gives one back changes it in place.",
        ["adapt", "activate", "route", "adaptations", "remove", "unload", "eject", "keep_neurons", "param_groups",
         "auxiliary_loss", "accelerate", "restore", "skip_padding", "capture", "refresh", "backend", "explain",
         "parameter_report"],
    ),
    "Saving and loading": ("", ["save", "load"]),
    "Merging": ("", ["merge", "unmerge", "swap"]),
    "Ops": (
        "Plain tensors in, plain tensors out, differentiable but for the merges, in every backend.",
        [f"ops.{name}" for name in (
            "bottleneck", "bottleneck_rows", "Slot", "lora_linear", "linear", "LowRank", "LowRanks", "add_norm",
            "attention", "mix", "drop", "merge_", "unmerge_", "swap_", "Residue", "ACTIVATIONS",
        )],
    ),
    "Modules": (
        "For models that no wiring knows. `fastadapt.modules` itself exports nothing: `accelerate` and `adapt` put the "
        "fused sublayers into a model.",
        ["LoRALinear"],
    ),
    "Configurations": (
        "What `adapt` takes: frozen dataclasses, whose fields are checked when they are made.",
        ["BottleneckConfig", "HoulsbyConfig", "PfeifferConfig", "ParallelConfig", "MaskedAdapterConfig", "AdapterDrop",
         "LoRAConfig", "PrefixConfig", "MAMConfig", "FusionConfig", "BitFitConfig", "LayerNormConfig", "HeadConfig"],
    ),
}  # fmt: skip

CONSTANTS = {"ops.ACTIVATIONS": "The nonlinearities that every backend has, by Hugging Face's names for them."}

# name, what it does, unset, where it is read.
VARIABLES = (
    (
        "FASTADAPT_BACKEND",
        "Forces one backend for the whole process, as `fa.backend` does: `reference`, `cpu`, `triton` or `cuda`. What "
        "it cannot run raises.",
        "the fastest that can serve, call by call",
        "`fastadapt/dispatch.py`, at import",
    ),
    (
        "FASTADAPT_CPU",
        "Picks the instruction set of the CPU kernels: `portable`, `avx2`, `avx512`, `avx512_bf16` or `amx`. One that "
        "this processor lacks raises and lists those it has.",
        "the fastest that the processor has",
        "`fastadapt/backends/cpu.py`, when the CPU kernels are loaded",
    ),
    (
        "FASTADAPT_POOL_MB",
        "The most memory, in MB of 2^20 bytes, that the CPU kernels keep of freed buffers for the next ones; 0 keeps "
        "none.",
        "a sixteenth of the machine's memory",
        "`csrc/cpu/pool.cpp`, at the first large buffer",
    ),
    (
        "FASTADAPT_CUDA",
        '`emulated` lets `fa.backend("cuda")` run the CUDA C++ kernels on CPU tensors, block by block, for tests. '
        "Other values do nothing.",
        "they take tensors on a GPU alone",
        "`fastadapt/backends/cuda.py`, when that backend is loaded",
    ),
    (
        "FASTADAPT_TUNED",
        "The file of the launches that `fastadapt tune` measures: written there, and read by the Triton backend.",
        "`fastadapt/tuned.json` in `XDG_CONFIG_HOME`, or in `~/.config`",
        "`fastadapt/backends/triton/tuned.py`, when the Triton backend is loaded",
    ),
    (
        "FASTADAPT_DEBUG",
        "`1` lets the command line show an error with where it comes from, and other libraries' warnings.",
        "an error is one line",
        "`fastadapt/cli/__init__.py`, by each command",
    ),
    (
        "FASTADAPT_BUILD",
        "`0` compiles no kernels; `1` makes a build that fails an error.",
        "a build that fails ends in pure Python",
        "`setup.py`, at install time",
    ),
)


def page() -> str:
    """The whole page."""
    check_names()
    parts = [
        "# API",
        "Every public name, by `import fastadapt as fa`, with its signature and the first paragraph of its docstring; "
        "`help(fa.adapt)` shows the arguments and errors too. Written by `docs/make_api.py`.",
        "\n".join(f"- [{title}](#{anchor(title)})" for title in (*SECTIONS, "Environment variables")),
    ]
    for title, (text, names) in SECTIONS.items():
        parts += [f"## {title}", *([text] if text else []), *(entry(name) for name in names)]
    parts += ["## Environment variables", table()]
    return "\n\n".join(parts) + "\n"


def check_names() -> None:
    """Raise where a section misses a public name, or shows one that is none."""
    public = {name for name in fa.__all__ if not inspect.ismodule(getattr(fa, name))}
    public |= {f"ops.{name}" for name in fa.ops.__all__}
    shown = [name for _, names in SECTIONS.values() for name in names]
    wrong = sorted((public ^ set(shown)) | {name for name in shown if shown.count(name) > 1})
    if wrong:
        raise SystemExit(f"docs/make_api.py: {', '.join(wrong)}: not public, in no section or in several")


def entry(name: str) -> str:
    """A name's heading, signature and first paragraph, and the methods of a class."""
    thing = fa
    for step in name.split("."):
        thing = getattr(thing, step)
    heading = f"### `fa.{name}`"
    if name in CONSTANTS:
        items = ", ".join(f"`{item}`" for item in thing)
        return f"{heading}\n\n{CONSTANTS[name]} {items}."
    code = signature(f"fa.{name}", thing)
    parts = [heading, f"```python\n{code}\n```", first_paragraph(thing)]
    if inspect.isclass(thing) and (methods := methods_of(thing)):
        parts.append("\n".join(methods))
    return "\n\n".join(parts)


def methods_of(kind: type) -> list[str]:
    """A line for every public method and property that a class has of its own and documents."""
    lines = []
    for name, member in vars(kind).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        call = name if isinstance(member, property) else f"{name}({', '.join(names)})"
        lines.append(f"- `{call}`: {first_paragraph(function)}")
    return lines


def signature(call: str, thing: Any) -> str:
    """``call(argument: type = default, ...) -> type``, in lines of at most ``WIDTH`` characters where it is longer."""
    found = inspect.signature(thing)
    arguments, keyword_only = [], False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            arguments, keyword_only = [*arguments, "*"], True
        arguments.append(argument(p))
    returns, context = "", ""
    if inspect.isfunction(thing):
        returns = f" -> {annotation(found.return_annotation)}"
        if returns.startswith(" -> Iterator["):  # of a context manager
            returns, context = ":", "with "
    line = f"{context}{call}({', '.join(arguments)}){returns}"
    if len(line) <= WIDTH:
        return line
    lines = ["   "]
    for text in arguments:
        if len(lines[-1]) + len(text) + 2 > WIDTH and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {text},"
    return "\n".join([f"{context}{call}(", *lines, f"){returns}"])


def argument(p: inspect.Parameter) -> str:
    text = f"{p.name}: {annotation(p.annotation)}"
    if p.default is p.empty:
        return text
    default = "..." if repr(p.default) == "<factory>" else repr(p.default)  # of a dataclass, made anew for each
    return f"{text} = {default}".replace("'", '"')


def annotation(text: Any) -> str:
    """A type as the source has it; the type variable of what comes back as it was given is a module."""
    text = text if isinstance(text, str) else inspect.formatannotation(text)
    return re.sub(r"\bModel\b", "nn.Module", text)


def first_paragraph(thing: Any) -> str:
    """As Markdown on one line."""
    text = " ".join(inspect.getdoc(thing).split("\n\n")[0].split())
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def table() -> str:
    rows = [("variable", "what it does", "unset", "where it is read"), ("---",) * 4]
    rows += [(f"`{name}`", *others) for name, *others in VARIABLES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(check: bool) -> int:
    text = page()
    if not check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        print("docs/api.md differs from the code: run python docs/make_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
