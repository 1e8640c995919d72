"""Turns an image of any kind into pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from utils import UserError

# EXIF's orientation -> what turns the stored pixels upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # EXIF's tag


def image_mode(channels: int) -> str:
    """Pillow's mode of the images for a model with this number of input channels. Raises UserError unless 1 or 3."""
    if channels not in (1, 3):
        raise UserError(f"the model takes {channels} channels (in_chans), images have 1 or 3: give a model of 1 or 3")
    return "L" if channels == 1 else "RGB"


def to_pixels(image: Image.Image, mode: str) -> Image.Image:
    """An image of any kind as 8-bit grey ("L") or colour ("RGB") values, upright.

    EXIF's orientation is applied. 16-bit values (modes I;16 and I) are divided by 257. Decimal values (mode F) are
    multiplied by 255 if none is above 1, else they are taken as they are. Transparency is dropped, as by Pillow's
    convert(): a transparent pixel has the colour that is stored for it. Raises UserError for whole numbers beyond
    0 to 65535 and for decimal values beyond 0 to 255.
    """
    image.load()  # first, because loading a TIFF applies its orientation and removes it
    turn = TURNS.get(_orientation(image))
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if it is converted to RGB at once
    image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises many types for damaged EXIF data, without which the image is as it is stored
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    values, whole = np.asarray(image), image.mode[0] == "I"
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (65535 if whole else 255)):  # a NaN is neither
        known = "whole numbers from 0 to 65535" if whole else "decimal numbers from 0 to 1 or from 0 to 255"
        raise UserError(f"its values go from {low:g} to {high:g}, not {known}: scale them to 8 or 16 bits")
    scale = 1 / 257 if whole else 255 if high <= 1 else 1
    return Image.fromarray(np.rint(values * scale).astype("uint8"))
