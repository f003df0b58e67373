"""Very many samples as one picture of points, small enough to be sent: a PNG of eight colours on no ground."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from lorameter.report.figure import Stretch
from lorameter.report.html.scale import Scale
from lorameter.report.html.svg import SERIES

FINE = 2
"""Pixels of the picture for each of the page's, so that it is sharp on a fine screen."""
COLOURS = ("0072b2", "d55e00", "009e73", "cc79a7", "e69f00", "56b4e9", "8a6d3b", "7f7f7f")
"""Those of the page's series, which are told apart by colour-blind readers as well (Okabe and Ito, 2008)."""


def picture_of(stretches: Sequence[Stretch], across: Scale, up: Scale, series: Mapping[str, int]) -> str:
    """All samples as a data: URL of a picture that fills the plane between the two scales."""
    width, height = (round(FINE * abs(scale.end - scale.begin)) for scale in (across, up))
    plane = np.zeros((height, width), dtype=np.uint8)
    for one in stretches:
        points = np.asarray([point for point in one.points if np.isfinite(point[1])], dtype=np.float64).reshape(-1, 2)
        columns = (points[:, 0] - across.low) / (across.high - across.low) * (width - 1)
        rows = (up.high - points[:, 1]) / (up.high - up.low) * (height - 1)
        colour = 1 + series.get(one.name, 0) % SERIES
        plane[rows.round().astype(int).clip(0, height - 1), columns.round().astype(int).clip(0, width - 1)] = colour
    return "data:image/png;base64," + base64.b64encode(_png(plane)).decode()


def _png(plane: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> bytes:
    """An indexed PNG (W3C PNG specification, third edition): colour 0 is transparent."""
    height, width = plane.shape
    palette = bytes(3) + b"".join(bytes.fromhex(colour) for colour in COLOURS)
    rows = np.hstack([np.zeros((height, 1), dtype=np.uint8), plane])  # each row begins with its filter, none
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
