"""The video decoders as cases of a test; torchcodec is skipped, with the reason, if absent."""

from __future__ import annotations

import pytest

from tvr.data_prep.video.decoders import frame_sampler

try:
    frame_sampler("torchcodec")
    no_torchcodec = ""
except ValueError as error:
    no_torchcodec = str(error)
torchcodec = pytest.param(
    "torchcodec", marks=pytest.mark.skipif(bool(no_torchcodec), reason=no_torchcodec)
)
decoders = pytest.mark.parametrize("decoder", ["pyav", torchcodec])
