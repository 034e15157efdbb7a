"""What is public is documented: every argument by its name, every name in docs/api.md; the README's first lines run."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastadapt as fa
from tests.tiny import make

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {f"fa.{name}": getattr(fa, name) for name in fa.__all__}
PUBLIC |= {f"fa.ops.{name}": getattr(fa.ops, name) for name in fa.ops.__all__}
CALLED = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing) or inspect.isfunction(thing)}


def documented(thing) -> set[str]:
    """The names that have an entry under Args or Attributes, of a class those of what it inherits from too."""
    owners = [c for c in thing.__mro__ if c.__module__.startswith("fastadapt.")] if inspect.isclass(thing) else [thing]
    docs = [inspect.getdoc(c) or "" for c in owners]
    docs += [inspect.getdoc(c.__init__) or "" for c in owners if inspect.isclass(c) and "__init__" in vars(c)]
    found: set[str] = set()
    for doc in docs:
        for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: .*)?(?:\n|\Z))*)", doc, re.MULTILINE):
            for names in re.findall(r"^ {4}(\w+(?:, \w+)*):", section, re.MULTILINE):
                found |= set(names.split(", "))
            found |= set(re.findall(r"``(\w+)``:", section))  # beside another, as in bottleneck's
    return found


@pytest.mark.parametrize("name", CALLED)
def test_every_argument_is_documented(name):
    missing = [p for p in inspect.signature(CALLED[name]).parameters if p not in documented(CALLED[name])]
    assert not missing, f"{name} says nothing about {', '.join(missing)}"


@pytest.fixture
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(make_api, tmp_path, monkeypatch, capsys):
    assert make_api.main(check=True) == 0, "run python docs/make_api.py"
    monkeypatch.setattr(make_api, "PAGE", tmp_path / "api.md")
    assert make_api.main(check=True) == 1 and "run python docs/make_api.py" in capsys.readouterr().err
    assert make_api.main(check=False) == make_api.main(check=True) == 0
    monkeypatch.setattr(fa, "__all__", [*fa.__all__, "dispatch_of_tomorrow"])
    fa.dispatch_of_tomorrow = None
    try:
        with pytest.raises(SystemExit, match="dispatch_of_tomorrow: not public, in no section"):
            make_api.page()
    finally:
        del fa.dispatch_of_tomorrow


def test_the_page_has_every_environment_variable(make_api):
    kinds = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}
    files = [f for folder in ("fastadapt", "csrc") for f in (ROOT / folder).rglob("*") if f.suffix in kinds]
    quoted = {name for f in (*files, ROOT / "setup.py") for name in re.findall(r'"(FASTADAPT_\w+)"', f.read_text())}
    assert quoted == {name for name, *_ in make_api.VARIABLES}
    for name, *_, where in make_api.VARIABLES:
        assert name in (ROOT / re.match("`(.+?)`", where)[1]).read_text()


def test_the_readmes_first_lines_run(tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().split("\n## Ten lines\n")[1].split("\n## ")[0]
    training, serving = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ids = {"input_ids": torch.arange(5, 12)[None]}
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda _, **options: make(**options))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: lambda text, return_tensors: ids)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(training, names)
    trained = names["model"].eval()
    fa.activate(trained, "sst2")
    with torch.no_grad():
        expected = trained(**ids).logits
    exec(serving, names)
    model = names["model"]
    assert model is not trained and fa.adaptations(model) == ["sst2"]
    with torch.no_grad():
        fa.activate(model, "sst2")
        assert torch.equal(model(**ids).logits, expected)
        fa.activate(model, None)
        torch.testing.assert_close(model(**ids).logits, make(num_labels=2)(**ids).logits, rtol=2e-5, atol=2e-5)
