"""run_*.sh: from any folder, as sbatch runs them, in environments of several kinds, with line endings of Windows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from programs import ROOT

from main_arguments import parse_main_arguments

STUB = '#!/bin/sh\necho "python $*"\n'
# In the place of python3: makes "environments" whose python says how it was called.
MAKER = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    [ -z "$FAIL" ] || { mkdir -p "$3/bin"; exit 1; }
    mkdir -p "$3/bin" && printf '#!/bin/sh\\necho "python $*"\\n' > "$3/bin/python" && chmod +x "$3/bin/python"
fi
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts in a folder of their own, and a python3 that only pretends."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in (*ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)
    executable(tmp_path / "bin/python3", MAKER)
    return folder


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def sh(script: Path, folder: Path, **more: str) -> subprocess.CompletedProcess:
    """Runs a script from a folder, with no environment active."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHON")}
    environment |= {"PATH": f"{script.parent.parent / 'bin'}:{os.environ['PATH']}", "DATA_SET": "cifar10", **more}
    return subprocess.run(["sh", str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_relative_paths_are_those_of_the_folder_it_is_started_in(project: Path, tmp_path: Path):
    python = executable(tmp_path / "stub/python", STUB)
    done = sh(project / "run_train.sh", tmp_path, PYTHON=str(python), DATA_PATH="images", CHECKPOINT="weights")
    assert done.returncode == 0, done.stderr
    assert f"python {project}/main.py --stage piad" in done.stdout
    assert "--checkpoint weights" in done.stdout and "--data-path images" in done.stdout
    assert "--output-dir output/peelable/vit_small" in done.stdout
    assert "installing" not in done.stdout and not (project / ".venv").exists()


def test_as_sbatch_runs_it(project: Path, tmp_path: Path):
    """A copy of the script in a folder of the scheduler, started in the folder of the project; elsewhere, one line."""
    (tmp_path / "spool").mkdir()
    copy = Path(shutil.copy(project / "run_train.sh", tmp_path / "spool/slurm_script"))
    python = executable(tmp_path / "stub/python", STUB)
    assert "python ./main.py --stage piad" in sh(copy, project, PYTHON=str(python)).stdout
    done = sh(copy, tmp_path, PYTHON=str(python))
    assert done.returncode == 2 and "start the script in the folder that holds common.sh" in done.stderr


def test_an_environment_is_made_once_and_a_half_made_one_anew(project: Path, tmp_path: Path):
    failed = sh(project / "run_train.sh", tmp_path, FAIL="yes")
    assert failed.returncode == 2 and not (project / ".venv").exists()
    executable(project / ".venv/bin/python", "#!/bin/sh\nexit 1\n")  # as a version of this script would have left it
    first = sh(project / "run_train.sh", tmp_path)
    assert "installing requirements.txt" in first.stdout and "main.py --stage piad" in first.stdout
    assert "installing" not in sh(project / "run_train.sh", tmp_path).stdout
    (project / "requirements.txt").write_text("torch\n")
    assert "installing requirements.txt" in sh(project / "run_train.sh", tmp_path).stdout


def test_flags_of_the_model_are_passed_on_where_they_were_given(project: Path, tmp_path: Path):
    python = executable(tmp_path / "stub/python", STUB)
    plain = sh(project / "run_test.sh", tmp_path, PYTHON=str(python), CHECKPOINT="weights").stdout
    assert not {"--model", "--model-kwargs", "--workers", "--mean"} & set(plain.split())
    more = {"MODEL": "vit_base", "MODEL_KWARGS": "img_size=98", "PREPROCESSING": "--crop-pct 1", "WORKERS": "3"}
    given = sh(project / "run_test.sh", tmp_path, PYTHON=str(python), CHECKPOINT="weights", **more).stdout
    for words in ("--model vit_base", "--model-kwargs img_size=98", "--crop-pct 1", "--workers 3"):
        assert words in given


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("run_train.sh", {}, {"progressive_epochs": 50, "dropout_ratio": 0.875, "op_code_per_rank": True, "lr": 5e-4,
                              "distillation_type": "none", "op_code_sampling": "uniform", "epochs": 300}),
        ("run_train.sh", {}, {"mixup": 0.8, "repeated_aug": 3, "ema_decay": 0.99996, "min_lr": 1e-5,
                              "sizes_per_step": 1, "sched_on_updates": False}),
        ("run_train.sh", {"MODEL": "vit_base"}, {"epochs": 150}),
        ("run_train.sh", {"RECIPE": "best"}, {"epochs": 30, "mixup": 0, "cutmix": 0, "aa": "none", "repeated_aug": 0}),
        ("run_train.sh", {"RECIPE": "best"}, {"progressive_epochs": 0, "op_code_sampling": "inverse-macs",
                                              "sizes_per_step": 3, "freeze_embedding": True, "op_code_per_rank": False,
                                              "distillation_alpha": 0.5, "distillation_tokens": 1, "lr": 3e-4}),
        ("run_train.sh", {"RECIPE": "best", "DATA_SET": "images"}, {"distillation_alpha": 1, "distillation_tokens": 4}),
        ("run_train.sh", {"RECIPE": "best", "DATA_SET": "digits"}, {"distillation_alpha": 0.75, "sizes_per_step": 1,
                                                                    "freeze_embedding": False, "lr": 1.6e-2}),
        ("run_train_peeled.sh", {}, {"distillation_type": "none", "drop_path": 0.1, "lr": 5e-5, "ema_decay": 0}),
        ("run_train_peeled.sh", {"RECIPE": "best"}, {"distillation_alpha": 0.5, "distillation_tokens": 1,
                                                     "drop_path": 0, "sched_on_updates": True,
                                                     "freeze_embedding": True, "lr": 3e-4}),
        ("run_train_peeled.sh", {"RECIPE": "best", "DATA_SET": "images"}, {"distillation_alpha": 1, "use_ema": False}),
        ("run_train_peeled.sh", {"RECIPE": "best", "DATA_SET": "digits"}, {"distillation_alpha": 0.75, "lr": 2e-3,
                                                                           "use_ema": False}),
        ("run_train_peeled.sh", {"CHECKPOINT": "", "RECIPE": "best"}, {"use_ema": True, "ema_decay": 0.998}),
        ("run_test.sh", {"CHECKPOINT": ""}, {"use_ema": False}),
        ("run_test.sh", {"CHECKPOINT": "", "RECIPE": "best"}, {"use_ema": True}),
    ],
)  # fmt: skip
def test_recipes(script: str, variables: dict[str, str], expected: dict[str, object], project: Path, tmp_path: Path):
    """main.py understands the flags of a recipe."""
    python = executable(tmp_path / "stub/python", STUB)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/mask_table.json").touch()
    (tmp_path / "output/peelable/vit_small").mkdir(parents=True)
    (tmp_path / "output/peelable/vit_small/checkpoint_0.pth").touch()
    done = sh(project / script, tmp_path, **{"PYTHON": str(python), "CHECKPOINT": "weights", **variables})
    flags = done.stdout.splitlines()[-1].split()[2:]
    with mock.patch.object(sys, "argv", ["main.py", *flags]):
        args = vars(parse_main_arguments())
    assert {key: args[key] for key in expected} == expected


def test_scripts_keep_their_line_endings():
    """A checkout by git for Windows must not change them: sh does not run what ends in CR LF."""
    assert "*.sh text eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()
    assert all(b"\r" not in path.read_bytes() for path in ROOT.glob("*.sh"))
