"""model.py in a sub-network's folder: it rebuilds the network where this project cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import ROOT
from test_families import FAMILIES, some_widths
from tiny import VARIANTS, draw_parameters

import supernet
from models import subnetwork
from models.backbone import create_backbone
from models.extraction import extract

# Run by a fresh process: loads each folder by its own model.py, compares the logits and trains a step.
ELSEWHERE = """
import importlib.util, json, pathlib, sys
import torch
from safetensors.torch import load_file

for name in ("models", "supernet", "utils", "files", "main"):
    if importlib.util.find_spec(name) is not None:
        sys.exit(f"{name} can be imported")
report = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    spec = importlib.util.spec_from_file_location(f"model_of_{folder.name}", folder / "model.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    expected = load_file(folder.parent.parent / f"{folder.name}.safetensors")
    model = code.load()
    with torch.inference_mode():
        difference = (model(expected["images"]) - expected["logits"]).abs().max().item()
    model = code.load(folder, drop_path_rate=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(expected["images"])
    logits = logits[0] if isinstance(logits, tuple) else logits
    torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
    report[folder.name] = [difference, moved]
print(json.dumps(report))
"""


def kinds() -> dict[str, tuple[str, dict]]:
    """Every family of models, and every kind of plain ViT, that a config.json can describe."""
    plain = {name: (timm_name, FAMILIES["rope"][1] | more) for name, (timm_name, more) in VARIANTS.items()}
    return {name: kind for name, kind in {**plain, **FAMILIES}.items() if "mlp_layer" not in kind[1]}


def test_every_family_is_rebuilt_and_trained_where_this_project_is_not(tmp_path: Path):
    from safetensors.torch import save_file

    images = torch.randn(2, 3, 32, 32)
    (tmp_path / "folders").mkdir()
    for name, (timm_name, model_kwargs) in kinds().items():
        network = supernet.create(timm_name, model_kwargs)
        draw_parameters(network.model)
        small = extract(network.model, some_widths(network.model)).eval()
        network.save(tmp_path / "folders" / name, small)
        save_file({"images": images, "logits": small(images).detach()}, tmp_path / f"{name}.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "folders")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == kinds().keys() and len(report) > 20
    for name, (difference, moved) in report.items():
        assert difference == 0, name
        assert moved > 10, name


def test_it_is_the_file_that_this_project_rebuilds_with(tmp_path: Path):
    """Copied, not written a second time; and three lines are enough to go on with it."""
    network = supernet.create("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2})
    network.save(tmp_path / "small", network.cut())
    assert (tmp_path / "small" / "model.py").read_bytes() == Path(subnetwork.__file__).read_bytes()
    code = "from model import load; model = load(drop_path_rate=0.1).train(); assert model.training"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "small", capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_resizing_gives_the_structure_that_extraction_fills(share: float):
    name, model_kwargs = FAMILIES["swin_v2"]
    model = create_backbone(name, **model_kwargs)
    widths = {key: max(1, int(width * share)) for key, width in supernet.opening.full_widths(model).items()}
    structure = subnetwork.structure(name, model_kwargs)
    subnetwork.resize(structure, widths)
    small = extract(model, widths)
    assert {key: value.shape for key, value in structure.state_dict().items()} == {
        key: value.shape for key, value in small.state_dict().items()
    }
    assert ROOT.is_dir()
