"""Checkpoints: tensors and plain Python values only, whole or absent. The one place that writes and reads them."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from utils import UserError, atomic_file, first_line, is_main_process, say


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a .pth that `torch.load(weights_only=True)` reads; whole or absent."""
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a .pth or .safetensors file as data: nothing in it is executed.

    argparse's Namespace is allowed, as DeiT-style checkpoints hold one. Raises UserError for a file that is missing,
    truncated, not a checkpoint, or that holds any other pickled object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is damaged or holds pickled objects that are not plain data; "
            "refused, nothing in it was run"
        ) from error
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or cut short: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def weights_of(state: dict[str, Any], path: Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: bare, or under `model` / `state_dict`, or `model_ema` if use_ema."""
    if use_ema and "model_ema" not in state:
        raise UserError(f"checkpoint {path} holds no averaged weights (model_ema); leave --eval-ema out")
    names = ["model_ema"] if use_ema else ["model", "state_dict"]
    weights = next((state[name] for name in names if isinstance(state.get(name), dict)), state)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"checkpoint {path} holds no weights: expected a state dict, bare or under model / state_dict")
    return weights


class CheckpointFolder:
    """checkpoint_<epoch>.pth of a run: the last two and the best are kept, and every `keep_every` epochs.

    settings: what makes the run what it is (plain values). Each checkpoint holds them, and a run with others does not
    go on from it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], keep_every: int = 0):
        self.folder, self.settings, self.keep_every = folder, settings, keep_every

    def save(self, epoch: int, state: dict[str, Any], best_epoch: int | None) -> None:
        """Writes checkpoint_<epoch>.pth on the main process, then deletes those not to be kept."""
        if not is_main_process():
            return
        save_checkpoint(self.folder / f"checkpoint_{epoch}.pth", {**state, "settings": self.settings})
        for old in self.epochs()[:-2]:
            if old != best_epoch and not (self.keep_every and (old + 1) % self.keep_every == 0):
                (self.folder / f"checkpoint_{old}.pth").unlink()

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, ascending."""
        names = (re.fullmatch(r"checkpoint_(\d+)\.pth", path.name) for path in self.folder.glob("checkpoint_*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def to_resume(self, resume: str | None) -> dict[str, Any] | None:
        """The state to go on from: None = a fresh start, "auto" = the newest whole checkpoint if any, else a file.

        Raises UserError for a checkpoint of a run with other settings.
        """
        if resume is None:
            return None
        paths = [Path(resume)]
        if resume == "auto":
            paths = [self.folder / f"checkpoint_{epoch}.pth" for epoch in reversed(self.epochs())]
        for path in paths:
            try:
                state = _run_state(path)
            except UserError as error:
                if resume != "auto":
                    raise
                say(f"passing over {path.name}: {error}")
                continue
            self._check_settings(path, state["settings"])
            say(f"resuming from {path}: epoch {state['epoch']}, step {state['step']}")
            return state
        say(f"no checkpoint in {self.folder} to resume: a fresh start")
        return None

    def _check_settings(self, path: Path, theirs: dict[str, Any]) -> None:
        for key, value in self.settings.items():
            if theirs.get(key) != value:
                raise UserError(
                    f"{path} is of a run with {key} {theirs.get(key)}, this one has {value}: "
                    "give the same flags, or another --output-dir, or leave --resume out"
                )


def _run_state(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can go on from."""
    state = load_checkpoint(path)
    missing = [key for key in ("model", "optimizer", "epoch", "step", "settings") if key not in state]
    if missing:
        raise UserError(f"checkpoint {path} holds no training run to resume: it has no {missing[0]}")
    return state
