"""A super-network, or a sub-network, which has one size, with everything that is known about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from models.backbone import Backbone, full_widths
from models.extraction import extract
from piad.mask_table import MaskTable
from pixels import image_mode, to_pixels
from wpac import refit as refitting
from wpac.allocation import DIM_LOSSES, load_dim_losses

from .device import DeviceProfile
from .facts import plain, stamp_of
from .known_fidelity import known_fidelity
from .latency import LATENCY, Latencies
from .latency_table import LatencyTable
from .saving import save_subnetwork
from .selection import count_sizes, evenly_spaced, largest_within
from .tables import DROPOUT_RATIO, table_of_losses


@dataclass
class Network:
    """What supernet.load(), create() and contract() give.

    model: images (B, C, height, width) to logits (B, classes), or to features (B, D) where it has no head.  table: op
    code -> widths; of a sub-network, op code 0 alone.  name, model_kwargs: timm's, of the whole backbone.
    preprocessing: timm's data configuration (input_size, mean, std, interpolation, crop_pct, crop_mode).  target: the
    output that sub-networks keep, "logits", "features" or "tokens" (see models.targets).  method: how the super-network
    was made: "paper", "best", "piad", or None.  grade: of its sub-networks, "cut" or "compensated"; of a sub-network,
    how it was made.  averaged: whether these are averaged (EMA) weights.  stamp: what the mask table and the
    compensation that belong to the weights carry, too.  source: the file of the weights.  facts: everything else that
    is written down with the weights.  dim_losses: module key -> (width,), how much the loss rises with each dim that is
    cut, after contraction by the method "best"; otherwise retable() reads them beside the weights.
    """

    model: Backbone = field(repr=False)
    table: MaskTable = field(repr=False)
    name: str
    model_kwargs: dict[str, Any]
    preprocessing: dict[str, Any]
    target: str
    method: str | None = None
    grade: str = "cut"
    averaged: bool = False
    stamp: str | None = None
    source: Path | None = None
    is_subnetwork: bool = False
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    dim_losses: dict[str, np.ndarray] | None = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        """What is written with weights of this network, so that they say what they are: plain values."""
        return plain(
            {
                "model": self.name,
                "model_kwargs": {**self.model_kwargs, "num_classes": self.model.num_classes},
                "preprocessing": self.preprocessing,
                "target": self.target,
                "method": self.method,
                "averaged_weights": self.averaged,
                "stamp": self.stamp,
            }
        )

    def read(self, image: Image.Image) -> Tensor:
        """An image of any kind (see pixels.to_pixels) under timm's evaluation transform: (C, height, width)."""
        return create_transform(**self.preprocessing)(to_pixels(image, image_mode(self.model.in_chans)))

    def macs(self, op_code: int = 0, convention: str = "linear") -> int:
        """MACs per image of an op code, in the convention "linear" or "full" (see models.count_macs)."""
        return self.sizes(op_code, convention)["macs"]

    def sizes(self, op_code: int = 0, convention: str = "linear") -> dict[str, int]:
        """macs (per image), params and memory (bytes of the weights) of an op code."""
        return count_sizes(self.model, self.table.widths(op_code), convention)

    def evenly_spaced(self, count: int, convention: str = "linear") -> list[int]:
        """At most `count` op codes, from the whole network to the smallest, evenly spaced in MACs."""
        return evenly_spaced(self.model, self.table, count, convention)

    def select(
        self,
        *,
        max_macs: float | None = None,
        max_params: float | None = None,
        max_memory: float | None = None,
        max_latency: float | None = None,
        min_throughput: float | None = None,
        convention: str = "linear",
        latencies: Latencies | LatencyTable | None = None,
    ) -> int:
        """The op code of the largest sub-network that meets all limits given.

        max_macs: per image, as `convention` counts ("linear" or "full").  max_params.  max_memory: bytes of the
        weights.  max_latency: seconds per batch.  min_throughput: images per second.  The last two are measured as
        `latencies` says (see latencies()), by default for one image on the model's device. With one of them, a smaller
        size is chosen where its fidelity is better, if a frontier.json or index.json beside the weights says so.
        Raises UserError where no size meets the limits, naming the smallest one, or the fastest.
        """
        limits = {"macs": max_macs, "params": max_params, "memory": max_memory, "latency": max_latency}
        limits = {key: limit for key, limit in limits.items() if limit is not None}
        if max_latency is not None or min_throughput:
            latencies = latencies or self.latencies()
        if min_throughput:
            limits["latency"] = min(limits.get("latency", float("inf")), latencies.batch_size / min_throughput)
        known: list[float] = []
        if "latency" in limits:
            known = known_fidelity(self.source, self.stamp, self.averaged, self.table, self.grade)
        return largest_within(self.model, self.table, limits, convention, latencies, known)

    def latencies(
        self,
        batch_size: int = 1,
        amp: torch.dtype | None = None,
        device: torch.device | None = None,
        folder: Path | None = None,
        runtime: str = "eager",
    ) -> Latencies:
        """Measured seconds per batch by op code.

        folder: where latency.json is kept (default: nowhere).  runtime: "eager", "compile" or "onnxruntime", see
        runtimes.runner().
        """
        path = folder / LATENCY if folder else None
        return Latencies(
            self.model, self.table, batch_size=batch_size, amp=amp, device=device, path=path, runtime=runtime
        )

    def retable(self, profile: DeviceProfile | None = None, dropout_ratio: float = DROPOUT_RATIO) -> None:
        """Makes the mask table of a network that the method "best" contracted anew, without images, in seconds.

        profile: of the device that the sub-networks are for, so that dims leave by their loss per second (default: by
        their loss per MAC).  dropout_ratio: share of the time, or of the MACs, that the table can drop.
        Raises UserError for a profile of another network, or where the loss of each dim is not kept beside the weights.
        """
        if profile is not None:
            profile.check_model(self.model)
        stamp = self.stamp or stamp_of(self.model.parameters())
        if self.dim_losses is None:
            folder = self.source.parent if self.source else Path()
            self.dim_losses = load_dim_losses(folder / DIM_LOSSES, self.model, stamp)
        self.table = table_of_losses(self.model, self.dim_losses, stamp, dropout_ratio, profile)

    def profile(self, path: Path | str) -> DeviceProfile:
        """The times of this network in a device.json, which python -m supernet.profile writes.

        Raises UserError for a file that is damaged or of another network.
        """
        return DeviceProfile.load(Path(path), self.model, self.name)

    def cut(
        self,
        op_code: int = 0,
        refit: Iterable[Tensor] | None = None,
        refit_steps: int = 0,
        share_memory: bool = False,
    ) -> Backbone:
        """The sub-network of an op code: timm's modules, physically smaller, on the model's device.

        refit: batches (B, C, height, width), without labels, on which its linear layers are solved anew; with
        refit_steps, its blocks are then trained for so many steps each, which takes longer and comes nearer to the
        whole network. Where that does not help (see wpac.refit), the sub-network and its grade are as without.
        share_memory: read the super-network's memory where possible; the result must not be trained then.
        Raises UserError for an op code that the table does not have, or for fewer than two images to refit on.
        """
        small = extract(self.model, self.table.widths(op_code), share_memory)
        if refit is not None and refitting.refit(self.model, small, refit, self.target, refit_steps).helped:
            small.grade = refitting.refit_grade(refit_steps)
        return small

    def subnetwork(self, op_code: int, grade: str) -> Network:
        """cut() as a network of its own, of one size; grade: how it is made."""
        small = self.cut(op_code)
        table, facts = MaskTable([full_widths(small)]), {"op_code": op_code}
        more = {"is_subnetwork": True, "averaged": False, "facts": facts, "dim_losses": None}
        return replace(self, model=small, table=table, grade=grade, **more)

    def known_code(self, op_code: int) -> int:
        """What reports call an op code of the table: of a sub-network, its op code in the super-network, if known."""
        return self.facts.get("op_code", op_code) if self.is_subnetwork else op_code

    def grade_of(self, small: Backbone) -> str:
        """How a sub-network that cut() gave was made."""
        return getattr(small, "grade", self.grade)

    def save(self, folder: Path | str, small: Backbone, **facts: Any) -> dict[str, Any]:
        """Writes a sub-network as a folder that load() opens, and returns its config.json.

        The folder holds model.safetensors, config.json and model.py, which rebuilds the network without this project.
        An older sub-network there is replaced. facts: plain values to add to config.json, such as op_code.
        Raises UserError where the folder cannot be written.
        """
        kept = self.facts if self.is_subnetwork else {}
        return save_subnetwork(Path(folder), small, self.describe(), {"grade": self.grade_of(small), **kept, **facts})
