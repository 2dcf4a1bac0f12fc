"""Collation: padding, masks and refused samples."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from builders.clip_files import plain_captions, tokenize

from tvr.data_prep.reading.collate import collate
from tvr.data_prep.records import BadSample, Caption, Replacement, Sample, hash_caption


def sample(key: str, num_frames: int, size: int = 4) -> Sample:
    frames = np.full((num_frames, size, size, 3), 7, dtype=np.uint8)
    times = tuple(float(i) for i in range(num_frames))
    return Sample(
        key=key,
        video_id=f"v{key}",
        captions=(Caption(text="a"),),
        frames=frames,
        frame_times_s=times,
    )


def test_padding_masks_and_rows() -> None:
    samples = [sample("a", 3), sample("b", 1)]
    replaced = Replacement(position=9, key="x", reason="checksum", detail="d")
    batch = collate(
        samples,
        [plain_captions("one two"), plain_captions("x", "y z")],
        [9, 4],
        tokenize,
        3,
        4,
        replaced=[replaced],
    )
    assert batch.frame_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.frames.shape == (2, 3, 3, 4, 4)
    assert batch.frames.sum(dim=(2, 3, 4)).tolist() == [[336, 336, 336], [336, 0, 0]]
    assert batch.captions == ("one two", "x", "y z")
    assert batch.caption_ids.tolist() == [hash_caption(text) for text in batch.captions]
    assert batch.caption_video.tolist() == [0, 1, 1]
    assert batch.word_mask.sum(dim=1).tolist() == [2, 1, 2]
    assert batch.positions.tolist() == [9, 4]
    assert batch.replaced == (replaced,)
    again = pickle.loads(pickle.dumps(batch))  # as when a worker sends it
    assert torch.equal(again.frames, batch.frames)


def test_equal_captions_of_several_videos_have_one_id() -> None:
    samples = [sample(f"set{n}/a", 1) for n in range(4)]
    texts = ["A man plays.", "a man  plays", "a man sings", "a man"]
    captions = [plain_captions(text) for text in texts]
    captions[3] = [Caption(text="a man", dropped_from="A man plays")]  # "plays" was dropped
    batch = collate(samples, captions, list(range(4)), tokenize, 1, 4)
    first, *others = batch.caption_ids.tolist()
    assert [other == first for other in others] == [True, False, True]
    assert len(set(batch.video_ids.tolist())) == 4


def test_channels_precede_height_and_width() -> None:
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    record = Sample(
        key="a",
        video_id="a",
        captions=(Caption(text="a"),),
        frames=frames,
        frame_times_s=(0.0, 1.0),
    )
    batch = collate([record], [plain_captions("a")], [0], tokenize, 2, 4)
    assert batch.frames[0, 1, 2, 3, 0] == frames[1, 3, 0, 2]


def test_no_samples_give_a_batch_of_no_rows() -> None:
    batch = collate([], [], [], tokenize, 3, 4)
    assert (batch.frames.shape, batch.token_ids.shape) == ((0, 3, 3, 4, 4), (0, 0))


def one_row_too_many(captions: Any) -> Any:
    return torch.ones(len(captions) + 1, 2).long(), torch.ones(len(captions) + 1, 2).long()


@pytest.mark.parametrize(
    ("record", "captions", "tokenizer", "message"),
    [
        (
            sample("k", 0),
            ["a"],
            tokenize,
            r"sample k: frames of shape \(0, 4, 4, 3\); expected 1 to",
        ),
        (sample("k", 4), ["a"], tokenize, r"sample k: frames of shape \(4, 4, 4, 3\)"),
        (sample("k", 3, size=5), ["a"], tokenize, r"frames of shape \(3, 5, 5, 3\)"),
        (sample("k", 3), ["a", " "], tokenize, "sample k: caption ' ' has no token"),
        (sample("k", 3), ["a"], one_row_too_many, r"ids \(2, 2\) and .* for 1 captions"),
    ],
)
def test_samples_that_give_an_empty_mask_are_refused(
    record: Sample, captions: list[str], tokenizer: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        collate([record], [plain_captions(*captions)], [0], tokenizer, 3, 4)


def test_bad_sample_can_be_pickled_and_has_a_known_reason() -> None:
    error = pickle.loads(pickle.dumps(BadSample("k", "checksum", "d")))
    assert (error.key, error.reason, str(error)) == ("k", "checksum", "k: checksum: d")
    with pytest.raises(ValueError, match="reason='odd' is not one of missing_file"):
        BadSample("k", "odd", "d")


def test_frames_in_the_buffer_are_not_copied() -> None:
    buffer = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    buffer[0], buffer[1, :2] = 5, 6

    def in_buffer(key: str, row: int, count: int) -> Sample:
        frames = buffer[row].numpy()[:count]
        times = tuple(float(i) for i in range(count))
        captions = (Caption(text="a"),)
        return Sample(key=key, video_id=key, captions=captions, frames=frames, frame_times_s=times)

    samples = [in_buffer("a", 0, 3), in_buffer("b", 1, 2)]
    arguments = ([plain_captions("a")] * 2, [0, 1], tokenize, 3, 4)
    batch = collate(samples, *arguments, buffer=buffer)
    assert batch.frames.data_ptr() == buffer.data_ptr()
    copied = collate(samples, *arguments)
    assert copied.frames.data_ptr() != buffer.data_ptr()
    assert torch.equal(batch.frames, copied.frames)
    for others in (samples[::-1], [samples[0], sample("c", 3)]):  # for example after a substitution
        mixed = collate(others, *arguments, buffer=buffer)
        assert mixed.frames.data_ptr() != buffer.data_ptr()
        assert [int(row.sum()) for row in mixed.frames] == [int(s.frames.sum()) for s in others]
