"""Batches are copied beside the computation, and their memory is lent until the copy is done."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tvr.data_prep.reading import batch_buffers
from tvr.data_prep.reading.batch_buffers import BatchSlots
from tvr.data_prep.records import Batch
from tvr.trainer.model.batch_copies import MAX_IN_FLIGHT, BatchCopies, CudaCopyStream, pin_pages

SHAPE = (2, 3, 4, 4, 3)
DEVICE = torch.device("cpu")


@dataclass
class FakeEvent:
    """The event behind a copy; the test says when the copy is done."""

    number: int
    journal: list[str]
    is_done: bool = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.journal.append(f"wait {self.number}")
        self.is_done = True


@dataclass
class FakeStream:
    """A copy stream on the host."""

    journal: list[str]
    events: list[FakeEvent] = field(default_factory=list)

    def copy(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], FakeEvent]:
        event = FakeEvent(len(self.events), self.journal)
        self.events.append(event)
        self.journal.append(f"copy {event.number}")
        return tuple(x.clone() for x in tensors), event


class Lent:
    """Batches in the slots of a pool, as a worker sends them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, journal: list[str]) -> None:
        monkeypatch.setattr(batch_buffers, "get_worker_info", lambda: SimpleNamespace(id=0))
        self.slots = BatchSlots(1, SHAPE)
        release = self.slots._release

        def noted(number: int) -> None:
            journal.append(f"free {number}")
            release(number)

        monkeypatch.setattr(self.slots, "_release", noted)

    def batch(self) -> Batch:
        slot = self.slots.lend(SHAPE[0])
        assert slot.number is not None
        slot.frames.fill_(slot.number + 1)
        ones = torch.ones(2, 3, dtype=torch.int64)
        made = Batch(
            positions=torch.arange(2),
            keys=("a", "b"),
            video_ids=torch.arange(2),
            frames=slot.frames,
            frame_mask=ones,
            captions=("a", "b"),
            caption_ids=torch.arange(2),
            token_ids=ones,
            word_mask=ones,
            caption_video=torch.arange(2),
        )
        return self.slots.receive(self.slots.send(made, slot))


def test_a_slot_is_freed_after_the_event_of_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    journal: list[str] = []
    lent, stream = Lent(monkeypatch, journal), FakeStream(journal)
    copies = BatchCopies(stream)

    def copy_next() -> Tensor:
        frames, *_ = copies.model_inputs(lent.batch(), DEVICE)
        gc.collect()
        return frames

    first = copy_next()
    assert journal == ["copy 0"]  # the batch is gone, its memory is not
    copy_next()
    assert journal == ["copy 0", "copy 1"]
    stream.events[0].is_done = stream.events[1].is_done = True
    copy_next()
    assert journal == ["copy 0", "copy 1", "free 0", "free 1", "copy 2"]
    assert first.eq(1).all()


def test_the_oldest_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    journal: list[str] = []
    lent, copies = Lent(monkeypatch, journal), BatchCopies(FakeStream(journal))
    assert MAX_IN_FLIGHT == 2
    for _ in range(4):
        copies.model_inputs(lent.batch(), DEVICE)
        gc.collect()
    expected = ["copy 0", "copy 1", "wait 0", "free 0", "copy 2", "wait 1", "free 1", "copy 3"]
    assert journal == expected


def test_without_a_gpu_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Lent(monkeypatch, []).batch()
    frames, *_ = BatchCopies().model_inputs(batch, DEVICE)
    assert frames.data_ptr() == batch.frames.data_ptr()


class FakeCuda:
    """The calls of CUDA's runtime that pin memory."""

    def __init__(self, error: int) -> None:
        self.error, self.calls = error, list[tuple[str, int]]()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls.append(("pin", address))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unpin", address))
        return 0


def test_pages_are_pinned_and_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(error=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    unpin: Callable[[], None] | None = pin_pages(4096, 8192)
    assert unpin is not None
    unpin()
    assert cuda.calls == [("pin", 4096), ("unpin", 4096)]


def test_memory_that_cannot_be_pinned_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, batch = FakeCuda(error=2), _empty_batch()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    slots = BatchSlots(1, SHAPE, pin_pages)
    for number in (0, 1):
        sent = batch_buffers.BatchInSlot(batch, number)
        assert slots.receive(sent).frames.shape == (2, 3, 3, 4, 4)
    assert len(cuda.calls) == 1
    (line,) = caplog.messages
    assert "CUDA error 2: the loader's memory" in line


def _empty_batch() -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        positions=nothing,
        keys=(),
        video_ids=nothing,
        frames=nothing,
        frame_mask=nothing,
        captions=(),
        caption_ids=nothing,
        token_ids=nothing,
        word_mask=nothing,
        caption_video=nothing,
    )


@pytest.mark.gpu
def test_a_gpu_copies_a_pinned_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(batch_buffers, "get_worker_info", lambda: SimpleNamespace(id=0))
    slots = BatchSlots(1, SHAPE, pin_pages)
    copies = BatchCopies(CudaCopyStream(device))
    for number in range(6):
        slot = slots.lend(SHAPE[0])
        slot.frames.fill_(number)
        sent = slots.send(replace(_empty_batch(), frames=slot.frames), slot)
        batch = slots.receive(sent)
        assert batch.frames.is_pinned()
        frames, *_ = copies.model_inputs(batch, device)
        assert frames.stride() == batch.frames.stride()
        assert frames.eq(number).all()
