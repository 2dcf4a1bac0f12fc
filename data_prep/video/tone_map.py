"""Maps pictures of high dynamic range, PQ or HLG, to standard range (BT.709, 8 bits).

The formulas are those of the ITU: the transfer functions of BT.2100, the tone curve (EETF) of
BT.2390 on the largest of R, G and B, reference white at 203 cd/m2 of BT.2408, the primaries of
BT.2087, and the display of BT.1886. Every picture has the same curve, whatever its metadata: a
curve that followed each picture's own peak would flicker, and mastering metadata are often wrong.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# AVColorTransferCharacteristic, and the name by which packing counts such a video.
PQ, HLG = 16, 18
HDR_TRANSFERS = {PQ: "pq", HLG: "hlg"}

PEAK = 1000.0
"""cd/m2 of the display for which HLG is defined and most PQ videos are graded; brighter is cut."""
WHITE = 203.0
"""cd/m2 that become the white of the standard range."""
DISPLAY_GAMMA = 2.4
HLG_SYSTEM_GAMMA = 1.2
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
ROWS = 64  # at a time, so that a large picture takes little memory

# To BT.709, by AVColorPrimaries; PQ and HLG without a tag have those of BT.2020.
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1188]],
    dtype=np.float32,
)
TO_BT709 = {
    1: np.eye(3, dtype=np.float32),
    12: np.array(  # Display P3
        [[1.2249, -0.2249, 0.0], [-0.0420, 1.0420, 0.0], [-0.0197, -0.0786, 1.0983]],
        dtype=np.float32,
    ),
}


def tone_map(coded: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Maps a picture to standard range.

    Args:
        coded: (H, W, 3) uint16 RGB, full range, coded with the transfer function.
        transfer: One of HDR_TRANSFERS.
        primaries: AVColorPrimaries of the picture.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    matrix = TO_BT709.get(primaries, BT2020_TO_BT709).T
    mapped = np.empty(coded.shape, dtype=np.uint8)
    for top in range(0, len(coded), ROWS):
        strip = coded[top : top + ROWS]
        light = _pq_light(strip) if transfer == PQ else _hlg_light(strip)
        linear = np.clip(light @ matrix, 0, 1)
        mapped[top : top + ROWS] = np.rint(255 * linear ** np.float32(1 / DISPLAY_GAMMA))
    return mapped


def _pq_light(coded: np.ndarray) -> np.ndarray:
    """Returns the light after the tone curve, 1 = white."""
    return _pq_table()[coded] * _pq_gain_table()[coded.max(axis=2)][..., None]


def _hlg_light(coded: np.ndarray) -> np.ndarray:
    scene = _hlg_table()[coded]
    brightness = np.maximum(scene @ LUMINANCE, 1e-6)
    display = scene * (brightness ** np.float32(HLG_SYSTEM_GAMMA - 1))[..., None]
    largest = np.maximum(display.max(axis=2, keepdims=True), np.float32(1e-9))
    return display / largest * _mapped(largest.astype(np.float64) * PEAK).astype(np.float32)


@cache
def _pq_table() -> np.ndarray:
    """Light of each 16-bit code, 1 = white."""
    return (pq_to_light(np.arange(65536) / 65535) / WHITE).astype(np.float32)


@cache
def _pq_gain_table() -> np.ndarray:
    """Factor of the tone curve for each code of the largest component."""
    light = np.maximum(pq_to_light(np.arange(65536) / 65535), 1e-9)
    return (_mapped(light) * WHITE / light).astype(np.float32)


@cache
def _hlg_table() -> np.ndarray:
    """Scene light of each 16-bit code, from 0 to 1: the inverse OETF of BT.2100."""
    code = np.arange(65536) / 65535
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


def _mapped(light: np.ndarray) -> np.ndarray:
    """Returns the tone curve of BT.2390 for light in cd/m2, 1 = white; black stays black."""
    peak = light_to_pq(np.array(PEAK))
    x = np.minimum(light_to_pq(light) / peak, 1)
    top = light_to_pq(np.array(WHITE)) / peak
    knee = 1.5 * top - 0.5
    t = np.maximum(x - knee, 0) / (1 - knee)
    curve = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * top
    )
    return pq_to_light(np.where(x < knee, x, curve) * peak) / WHITE


M1, M2 = 2610 / 16384, 2523 / 4096 * 128
C1, C2, C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def pq_to_light(code: np.ndarray) -> np.ndarray:
    """Returns cd/m2 of PQ codes from 0 to 1 (SMPTE ST 2084)."""
    root = code ** (1 / M2)
    return 10000 * (np.maximum(root - C1, 0) / (C2 - C3 * root)) ** (1 / M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Returns PQ codes from 0 to 1 of light in cd/m2."""
    root = (light / 10000) ** M1
    return ((C1 + C2 * root) / (1 + C3 * root)) ** M2
