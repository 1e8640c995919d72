"""What the README shows is what there is."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from PIL import Image
from programs import ROOT, Road

import supernet.network

README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_it_stands(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its lines are a doctest's, and that runs where the demo would have left a network: here lies a smaller one."""
    (test,) = doctest.DocTestFinder(recurse=False).find(supernet.network, globs={})
    lines = [example.source.rstrip() for example in test.examples]
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert [line for line in shown.splitlines() if line] == lines and len(lines) == 10
    (tmp_path / "output/demo/peelable").mkdir(parents=True)
    (tmp_path / "output/demo/peelable/digits").symlink_to(road.peelable)
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    report = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0 and result.attempted == 10, "".join(report)
    assert supernet.load("output/cut").grade == "cut"


def test_every_file_and_script_it_names_is_there():
    names = set(re.findall(r"\b(?:run_\w+\.sh|\w+\.py|docs/\w+\.png|requirements[\w-]*\.txt|LICENSE)\b", README))
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists() and not list(ROOT.glob(f"*/{name}"))] == []
