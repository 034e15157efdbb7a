"""The build: kernels where they can be compiled, else pure Python and one plain message."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastadapt

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"] if (ROOT / "pyproject.toml").is_file() else {}

pytestmark = pytest.mark.skipif(not PROJECT, reason="needs the source tree")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def modern_setuptools() -> bool:
    try:
        from importlib.metadata import version

        return int(version("setuptools").partition(".")[0]) >= 77
    except ImportError:
        return False


needs_setuptools = pytest.mark.skipif(not modern_setuptools(), reason="needs setuptools 77 or newer")


@pytest.fixture
def tree(tmp_path):
    """A copy of the project whose only C++ source is ``csrc/probe.cpp``."""
    for name in ("pyproject.toml", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("# fastadapt\n")
    package = tmp_path / "fastadapt"
    package.mkdir()
    shutil.copy(ROOT / "fastadapt" / "__init__.py", package / "__init__.py")
    setup = (ROOT / "setup.py").read_text()
    for name, sources in (("CPU", '["csrc/probe.cpp"]'), ("CUDA", "[]")):
        setup, replaced = re.subn(
            rf"^{name}_SOURCES: list\[str\] = \[.*?\]$",
            f"{name}_SOURCES: list[str] = {sources}",
            setup,
            flags=re.MULTILINE | re.DOTALL,
        )
        assert replaced == 1
    (tmp_path / "setup.py").write_text(setup)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "probe.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int probe() { return 7; }\n'
    )
    return tmp_path


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("FASTADAPT_BUILD", "CXX")}
    arguments = command or ("bdist_wheel", "--dist-dir", "dist")
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**variables, **environment},
        capture_output=True,
        text=True,
    )


def outcome(tree: Path) -> str:
    (path,) = tree.glob("build/lib*/fastadapt/build_report.json")
    return json.loads(path.read_text())["kernels"]


@needs_setuptools
def test_pure_python_on_request(tree):
    done = build(tree, FASTADAPT_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert [wheel.name for wheel in (tree / "dist").iterdir()] == [
        f"fastadapt-{fastadapt.__version__}-py3-none-any.whl"
    ]
    assert outcome(tree) == "not compiled: FASTADAPT_BUILD=0"


@needs_setuptools
def test_without_a_compiler_it_says_so_once_and_installs(tree):
    done = build(tree, CXX="no-such-compiler", PATH=str(tree))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fastadapt:")]
    assert len(said) == 1
    assert "pure Python" in said[0] and "no C++ compiler found (no-such-compiler)" in said[0]
    assert "no C++ compiler" in outcome(tree)


@needs_setuptools
@needs_compiler
def test_kernels_are_compiled(tree):
    done = build(tree, FASTADAPT_BUILD="1")
    assert done.returncode == 0, done.stderr
    (library,) = tree.glob("build/lib*/fastadapt/_C.so")
    assert ctypes.CDLL(str(library)).probe() == 7
    assert outcome(tree) == "compiled"


@needs_setuptools
@needs_compiler
def test_an_unchanged_library_in_the_source_tree_is_not_compiled_again(tree):
    source, library = tree / "csrc" / "probe.cpp", tree / "fastadapt" / "_C.so"
    in_place = ("build_ext", "--inplace")
    assert build(tree, *in_place).returncode == 0
    first = library.stat().st_mtime_ns
    again = build(tree, *in_place)
    assert "up to date" in again.stderr and library.stat().st_mtime_ns == first
    source.write_text(source.read_text().replace("7", "8"))
    changed = build(tree, *in_place)
    assert "up to date" not in changed.stderr
    assert ctypes.CDLL(str(library)).probe() == 8


@needs_setuptools
@needs_compiler
def test_a_broken_compile_falls_back_and_shows_the_compilers_last_lines(tree):
    (tree / "csrc" / "probe.cpp").write_text("#error this kernel cannot be compiled\n")
    done = build(tree)
    assert done.returncode == 0, done.stderr
    assert "could not be compiled; installing pure Python" in done.stderr
    told = done.stderr[done.stderr.index("could not be compiled") :]
    assert "this kernel cannot be compiled" in told
    assert "Traceback" not in told
    assert outcome(tree) == "the C++ compiler failed"
    assert not list(tree.glob("build/lib*/fastadapt/_C*.so"))


@needs_setuptools
@needs_compiler
def test_a_broken_compile_is_an_error_where_the_build_is_demanded(tree):
    (tree / "csrc" / "probe.cpp").write_text("#error this kernel cannot be compiled\n")
    assert build(tree, FASTADAPT_BUILD="1").returncode != 0


@needs_setuptools
def test_demanding_what_cannot_be_built_is_one_line(tree):
    (tree / "csrc" / "probe.cpp").unlink()
    done = build(tree, FASTADAPT_BUILD="1")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "fastadapt: FASTADAPT_BUILD=1, but the C++ kernels cannot be built: source file missing: csrc/probe.cpp"
    )


@needs_setuptools
def test_another_value_is_refused(tree):
    done = build(tree, FASTADAPT_BUILD="yes")
    assert done.returncode != 0
    assert "FASTADAPT_BUILD: got 'yes'; accepted are 0" in done.stderr


@needs_setuptools
def test_no_library_of_an_earlier_build_survives_a_refusal(tree):
    stale = tree / "fastadapt" / "_C.so"
    stale.write_text("old")
    build(tree, "build_py", FASTADAPT_BUILD="0")
    (built,) = tree.glob("build/lib*/fastadapt")
    (built / "_C.so").write_text("old")
    build(tree, "build_py", FASTADAPT_BUILD="0")
    assert not (built / "_C.so").exists()


def test_every_listed_source_exists_and_every_source_is_listed():
    text = (ROOT / "setup.py").read_text()
    listed = {Path(path) for path in re.findall(r'"(csrc/[^"]+\.(?:cpp|cu))"', text)}
    present = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert listed == present


def test_supported_versions():
    assert PROJECT["requires-python"] == ">=3.11"
    assert set(PROJECT["dependencies"]) == {"torch>=2.11,<2.14", "transformers>=4.57.6,<6", "safetensors>=0.4.3"}
    assert not any("triton" in requirement for requirement in PROJECT["dependencies"])
    assert {"train", "bench", "dev"} <= set(PROJECT["optional-dependencies"])


def test_the_console_script_is_the_command_line():
    import fastadapt.cli

    module, _, function = PROJECT["scripts"]["fastadapt"].partition(":")
    assert module == "fastadapt.cli" and callable(getattr(fastadapt.cli, function))
    done = subprocess.run([sys.executable, "-m", "fastadapt", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: fastadapt" in done.stdout
