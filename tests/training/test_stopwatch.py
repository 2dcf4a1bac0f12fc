"""`LapStopwatch`: seconds of the parts of a step, by the host or by events in a GPU stream."""

from __future__ import annotations

import time

import pytest
import torch

from tvr.trainer.monitoring.stopwatch import LapStopwatch


class Event:
    """A CUDA event of a fake GPU, whose queue has run all events recorded up to `Event.now`."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        Event.recorded = self.at = Event.recorded + 1.0

    def query(self) -> bool:
        return self.at <= Event.now

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return 1000 * (other.at - self.at)

    recorded = 0.0


def test_laps_a_gpu_has_not_reached_are_returned_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: pytest.fail("it synchronises"))
    watch = LapStopwatch(torch.device("cuda"))  # at 1
    for part in ("encode", "backward", "encode"):  # at 2, 3, 4
        watch.lap(part)
    assert watch.pop_finished() == {}
    Event.now = 3.0
    assert watch.pop_finished() == {"encode": 1.0, "backward": 1.0}
    assert watch.pop_finished() == {}
    watch.lap("loss")  # at 5
    Event.now = 5.0
    assert watch.pop_finished() == {"encode": 1.0, "loss": 1.0}


@pytest.mark.gpu
def test_laps_of_a_gpu_are_read_without_synchronising() -> None:
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    watch = LapStopwatch(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            x = (x @ x).tanh()
        watch.lap("encode")
        known = watch.pop_finished()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    known = {**watch.pop_finished(), **known}
    assert known["encode"] > 0


def test_laps_add_up_to_the_elapsed_time() -> None:
    started = time.perf_counter()
    watch = LapStopwatch(torch.device("cpu"))
    for part in ("encode", "backward", "encode"):
        time.sleep(0.01)
        watch.lap(part)
    laps, whole = watch.pop_all(), time.perf_counter() - started
    assert list(laps) == ["encode", "backward"]
    assert laps["backward"] >= 0.01
    assert laps["encode"] >= 0.02
    assert sum(laps.values()) <= whole
    watch.lap("loss")
    assert list(watch.pop_all()) == ["loss"]
