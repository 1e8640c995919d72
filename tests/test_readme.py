"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image
from programs import MODEL_KWARGS, NAME, ROOT, Road

README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_it_stands(road: Road, tmp_path: Path, capsys, monkeypatch):
    """Only the names of the model, of the files and the size are put in."""
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    put_in = {
        '"vit_small", {}': f"{NAME!r}, {MODEL_KWARGS!r}",
        '"output/peelable/vit_small/checkpoint_299.pth"': repr(str(road.super_network)),
        "max_macs=2.4e9": "max_macs=2e5",
        '.convert("RGB")': '.convert("L")',
    }
    for shown, real in put_in.items():
        assert shown in code
        code = code.replace(shown, real)
    exec(code, {})
    assert "topk" in capsys.readouterr().out


def test_every_file_and_script_it_names_is_there():
    names = set(re.findall(r"\b(?:run_\w+\.sh|\w+\.py|docs/\w+\.png|requirements\.txt|LICENSE)\b", README))
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists() and not list(ROOT.glob(f"*/{name}"))] == []
