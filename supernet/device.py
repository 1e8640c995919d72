"""The time of a network on a device, at any widths: device.json holds the time of each kind of module at a few widths.

    {"format": 1, "model": "vit_small_patch16_224", "device": "AMD EPYC, 1 thread", "runtime": "eager",
     "dtype": "float32", "batch_size": 1, "rest": 0.0009, "modules": {
      "attn: 6 heads of 64 dims, D 384, 197 tokens": {"count": 12, "seconds": {"0": 0, "8": 0.0007, "64": 0.0012}},
      "mlp: 1536 hidden units, D 384, 197 tokens": {"count": 12, "seconds": {"0": 0, "48": 0.0001, "1536": 0.0021}}}}

The time of a network is that of the rest (patch embedding, last norm, head) and of its modules.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from files import read_json, shown, write_text
from models.backbone import Backbone, Module, modules_of
from piad.dropout_list import Units, rounded_unit_sizes
from utils import UserError

FORMAT = 1
DEVICE = "device.json"
# What a time depends on besides the network, and the types of the values.
CONDITIONS = {"device": str, "runtime": str, "dtype": str, "batch_size": int}


def shape_of(module: Module) -> str:
    """What the time of a module depends on, in words, at full width: modules of the same shape take the same time."""
    if module.kind == "mlp":
        gated = "gated " if module.parts == 2 else ""
        return f"mlp: {module.width} {gated}hidden units, D {module.dim}, {module.tokens} tokens"
    windows = f" in windows of {module.keys}" if module.keys != module.tokens else ""
    alone = ", v alone is cut" if module.parts == 1 else ""
    return f"attn: {module.heads} heads of {module.width} dims, D {module.dim}, {module.tokens} tokens{windows}{alone}"


class DeviceProfile:
    """The seconds that one network takes on a device, at any widths. content: what device.json holds."""

    def __init__(self, content: Any, model: Backbone, name: str):
        """model, name: the whole network that the profile is for.

        Raises UserError for a content that is damaged or of another network.
        """
        self.content = _checked(content)
        self.shapes = {key: shape_of(module) for key, module in modules_of(model).items()}
        self.unit_sizes = rounded_unit_sizes(modules_of(model))
        counts = {shape: entry["count"] for shape, entry in content["modules"].items()}
        needed = dict(Counter(self.shapes.values()))
        if counts != needed:
            odd = min({*counts.items()} ^ {*needed.items()})[0]
            raise UserError(
                f"measured on {shown(content['model'])}, not on this {name}: it has {counts.get(odd, 0)} modules of "
                f"shape {shown(odd)!r}, this network {needed.get(odd, 0)}; make one with python -m supernet.profile"
            )
        self.curves = {}
        for shape, entry in content["modules"].items():
            width = next(module.width for key, module in modules_of(model).items() if self.shapes[key] == shape)
            self.curves[shape] = _curve(shape, entry["seconds"], width)

    @classmethod
    def load(cls, path: Path, model: Backbone, name: str) -> DeviceProfile:
        """Reads device.json; arguments and errors as above, with the name of the file."""
        content = read_json(path)
        try:
            return cls(content, model, name)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Writes device.json; the file is complete or not there at all."""
        write_text(path, json.dumps(self.content, indent=1) + "\n")

    def check(self, **conditions: Any) -> None:
        """Raises UserError unless the profile was made under these of CONDITIONS."""
        for key, value in conditions.items():
            if self.content[key] != value:
                raise UserError(
                    f"the profile was made for {key.replace('_', ' ')} {shown(self.content[key])}, not for {value}: "
                    "make one with python -m supernet.profile"
                )

    def check_model(self, model: Backbone) -> None:
        """Raises UserError unless the profile is of a network with the same modules."""
        if self.shapes != {key: shape_of(module) for key, module in modules_of(model).items()}:
            raise UserError(
                f"the profile is of another network, {shown(self.content['model'])}: open the file with profile() of "
                "this network, or measure this one"
            )

    def of_module(self, key: str, width: int) -> float:
        """The seconds of a module, such as "3.attn", at a width: interpolated between the widths that were measured."""
        return float(np.interp(width, *self.curves[self.shapes[key]]))

    def of(self, widths: dict[str, int]) -> float:
        """The seconds of the whole network at the widths."""
        return self.content["rest"] + self.units().total(widths)

    def units(self) -> Units:
        """The units of the network, which cost their seconds."""
        return Units(self.unit_sizes, self.of_module)

    def conditions(self) -> dict[str, Any]:
        """What it was measured on, for a mask table that is made for it."""
        return {key: self.content[key] for key in CONDITIONS}


# ---------------------------------------------------------------------------------------------------------------------
# Reading: the file may have been written by hand


def _checked(content: Any) -> dict[str, Any]:
    """Raises UserError unless all keys are there, with values of the right type, except for the times of modules."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"not a profile of format {FORMAT}, which python -m supernet.profile writes")
    for key, kind in {"model": str, **CONDITIONS, "modules": dict}.items():
        if type(content.get(key)) is not kind:
            raise UserError(f"{key} is {shown(repr(content.get(key)))}, not of type {kind.__name__}")
    if content["batch_size"] < 1:
        raise UserError(f"batch_size is {content['batch_size']}, not 1 or more")
    if not _is_time(content.get("rest")):
        raise UserError(f"rest is {shown(repr(content.get('rest')))}, not a number of seconds")
    for shape, entry in content["modules"].items():
        right = isinstance(entry, dict) and type(entry.get("count")) is int and isinstance(entry.get("seconds"), dict)
        if not right:
            raise UserError(f"{shown(shape)}: count or seconds are missing or of another type")
    return content


def _curve(shape: str, seconds: dict[str, Any], full: int) -> tuple[list[int], list[float]]:
    """Widths, ascending from 0, and the seconds at each of them."""
    for width, value in seconds.items():
        if not re.fullmatch(r"0|[1-9]\d{0,6}", width, re.ASCII) or int(width) > full:
            raise UserError(f"{shape}: {shown(repr(width))} is not a width from 0 to {full}")
        if not _is_time(value):
            raise UserError(f"{shape}: width {width} takes {shown(repr(value))}, which is not a number of seconds")
    times = {0: 0.0} | {int(width): float(value) for width, value in sorted(seconds.items(), key=lambda x: int(x[0]))}
    if full not in times:
        raise UserError(f"{shape}: the time at the full width, {full}, is missing")
    if times[0] or not times[full]:
        width, wanted = (0, "nothing, because it is bypassed there") if times[0] else (full, "more than nothing")
        raise UserError(f"{shape}: width {width} takes {times[width]:g} s; it has to take {wanted}")
    for smaller, width in zip(times, [*times][1:], strict=False):
        if times[width] < times[smaller]:
            raise UserError(
                f"{shape}: width {width} takes {times[width]:g} s, less than width {smaller} ({times[smaller]:g} s); "
                "a smaller width must not take longer"
            )
    return [*times], [*times.values()]


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
