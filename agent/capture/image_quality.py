"""Measures of one picture from one reduced decode: brightness, contrast, sharpness, noise. Owner of Pillow.

Memory is bounded by the header's size before anything is decoded, and whatever the bytes are, the only error is
BrokenImageError.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from statistics import median
from typing import TYPE_CHECKING

from agent.capture.container import BrokenImageError, capture_time, check_container, read_header

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BrokenImageError", "Measures", "capture_time", "check_container", "measure"]

LONG_SIDE = 480
"""The decode is reduced as far as its long side stays at or above this, in pixels."""
MAX_PROGRESSIVE_PIXELS = 8_000_000
"""A progressive JPEG needs all its coefficients in memory at any scale."""
COLUMNS, ROWS = 4, 3
REGIONS = COLUMNS * ROWS
FLOOR = 0.3
"""Added to gradient energies so that flat regions give a ratio near one, not noise."""
UNDER, OVER = 16, 240
LEAST_CONTRAST, LEAST_MEAN = 24, 14

LEVELS = range(256)
SQUARES = [level * level for level in LEVELS] * 2


@dataclass(frozen=True)
class Measures:
    """One picture in numbers; luma is 0 to 255.

    `under` and `over` are the shares of pixels below 16 and at or above 240. `sharpness` is R, the natural logarithm of
    gradient energy at the decoded scale over that at half of it, as the median of `regions` (4 columns × 3 rows, row by
    row); defocus lowers it. `noise` is the median absolute Laplacian.
    """

    width: int
    height: int
    mean: float
    std: float
    p1: int
    p50: int
    p99: int
    under: float
    over: float
    sharpness: float
    regions: tuple[float, ...]
    noise: float

    @property
    def contrast(self) -> int:
        return self.p99 - self.p1

    @property
    def assessable(self) -> bool:
        """Whether sharpness means anything: there is light and structure."""
        return self.contrast >= LEAST_CONTRAST and self.mean >= LEAST_MEAN


def measure(data: bytes) -> Measures:
    """Decode the JPEG in `data` at reduced size and measure it. Raises BrokenImageError."""
    header = read_header(data)
    if header.progressive and header.width * header.height > MAX_PROGRESSIVE_PIXELS:
        raise BrokenImageError("unsupported")
    try:
        return _measure(_decode(data, header.width, header.height), header.width, header.height)
    except Exception as error:  # whatever a decoder does with hostile bytes, the watch goes on
        raise BrokenImageError("decode") from error


def _decode(data: bytes, width: int, height: int) -> Image:
    from PIL import JpegImagePlugin

    scale = min(1.0, LONG_SIDE / max(width, height))
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        image.draft("L", (math.ceil(width * scale), math.ceil(height * scale)))
        return image.convert("L")


def _measure(luma: Image, width: int, height: int) -> Measures:
    histogram = luma.histogram()
    pixels = sum(histogram)
    mean = sum(map(mul, LEVELS, histogram)) / pixels
    variance = sum(map(mul, SQUARES, histogram)) / pixels - mean * mean
    regions = _sharpness(luma)
    return Measures(
        width=width,
        height=height,
        mean=mean,
        std=math.sqrt(max(0.0, variance)),
        p1=_quantile(histogram, pixels, 0.01),
        p50=_quantile(histogram, pixels, 0.50),
        p99=_quantile(histogram, pixels, 0.99),
        under=sum(histogram[:UNDER]) / pixels,
        over=sum(histogram[OVER:]) / pixels,
        sharpness=median(regions),
        regions=regions,
        noise=_noise(luma),
    )


def _quantile(histogram: Sequence[int], total: int, share: float) -> int:
    below = 0
    for level, count in enumerate(histogram):
        below += count
        if below >= share * total:
            return level
    return len(histogram) - 1


def _sharpness(luma: Image) -> tuple[float, ...]:
    fine, coarse = _gradient_energies(luma), _gradient_energies(luma.reduce(2))
    return tuple(math.log((full + FLOOR) / (half + FLOOR)) for full, half in zip(fine, coarse, strict=True))


def _gradient_energies(luma: Image) -> list[float]:
    """Mean of dx² + dy² per region; zeros for pictures too small to have regions."""
    from PIL import Image, ImageChops

    width, height = luma.width - 1, luma.height - 1
    if width < COLUMNS or height < ROWS:
        return [0.0] * REGIONS
    here = luma.crop((0, 0, width, height))
    across = ImageChops.difference(luma.crop((1, 0, width + 1, height)), here)
    down = ImageChops.difference(luma.crop((0, 1, width, height + 1)), here)
    both = Image.merge("LA", (across, down))
    energies = []
    for row in range(ROWS):
        top, bottom = height * row // ROWS, height * (row + 1) // ROWS
        for column in range(COLUMNS):
            left, right = width * column // COLUMNS, width * (column + 1) // COLUMNS
            histogram = both.crop((left, top, right, bottom)).histogram()
            energies.append(sum(map(mul, SQUARES, histogram)) / ((right - left) * (bottom - top)))
    return energies


def _noise(luma: Image) -> float:
    from PIL import ImageFilter

    if luma.width < 3 or luma.height < 3:
        return 0.0
    laplacian = luma.filter(ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128))
    signed = laplacian.histogram()
    folded = [signed[128], *(signed[128 + level] + signed[128 - level] for level in range(1, 128))]
    return float(_quantile(folded, sum(folded), 0.5))
