"""Caption vectors from the captions' words, without a model: tf-idf, projected at random.

Each distinct word of a caption counts once, with its idf log((1 + C) / (1 + c)), for C captions of
which c contain it. Word w has the signs of the bits of blake2b(w), a vector of WIDTH values of +1
and -1. The caption's vector is the sum of these, weighted by idf and scaled to one length. The dot
product of two such vectors estimates the cosine of the captions' tf-idf vectors, with a standard
deviation of 1 / sqrt(WIDTH) = 0.06 (random projection: Achlioptas, J. Comput. Syst. Sci. 66, 2003).

Two captions of the same words in another order have equal vectors and differ as texts. They are
the hardest negatives: "a red square on a blue one".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.dataset.sample_codec import parse_meta
from tvr.data_prep.hard_batches.caption_vectors import CaptionRows, write_vectors
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import (
    TRANSIENT_REASONS,
    BadSample,
    hash_caption,
    hash_video_id,
    normal_caption,
)

WIDTH = 256
# Length of a vector: a value is 20 on average, and 127 is six times the standard deviation.
LENGTH = 320.0
# Samples of which the vectors are held at once.
ROWS = 4096
# Threads that read captions: a store, or a shared disk, answers each read late.
READERS = 16
# Samples that a thread reads at a time.
READ_ROWS = 32
SOURCE = "words of the captions"
# Beside the vectors: each caption as a line of JSON, for vectors that a model makes later.
CAPTIONS_NAME = "captions.jsonl"
# A letter of a script without spaces is a word of its own; otherwise a run of letters and digits.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+"
)


class SampleCaptions(NamedTuple):
    """The captions of one sample."""

    video_id: str
    texts: tuple[str, ...]


def words_of(caption: str) -> list[str]:
    """Returns the distinct words of a caption, in the form in which equal captions agree."""
    return list(dict.fromkeys(_WORD.findall(normal_caption(caption))))


def write_word_vectors(folder: Path, samples: Iterable[SampleCaptions], *, content: str) -> None:
    """Makes the vectors of a data set from the words of its captions.

    Holds 4 bytes per word of every caption, 8 bytes per caption, and the vocabulary.

    Args:
        folder: Where to write.
        samples: The samples in order. One without captions is never in a hard group.
        content: `Manifest.content` of the data set.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, int] = {}
    counts = Counter[int]()
    words, ends, texts = array("I"), array("Q"), array("Q")
    videos, num_captions = array("Q"), array("I")
    with (folder / CAPTIONS_NAME).open("w", encoding="utf-8") as file:
        for sample in samples:
            for text in sample.texts or ("",):
                own = [numbers.setdefault(word, len(numbers)) for word in words_of(text)]
                counts.update(own)
                words.extend(own)
                ends.append(len(words))
                texts.append(hash_caption(text) if text else 0)
                file.write(json.dumps(text) + "\n")
            videos.append(hash_video_id(sample.video_id))
            num_captions.append(max(1, len(sample.texts)))
        # Before the index says that the folder is complete.
        file.flush()
        os.fsync(file.fileno())
    idf = np.log((1 + len(texts)) / (1 + np.array([counts[n] for n in range(len(numbers))])))
    signs = np.stack([_sign_bits(word) for word in numbers] or [_sign_bits("")])
    parts = _parts(
        (np.asarray(words), np.append(np.uint64(0), np.asarray(ends))),
        (np.asarray(texts), np.asarray(videos), np.asarray(num_captions)),
        idf,
        signs,
    )
    write_vectors(
        folder, parts, width=WIDTH, content=content, source=SOURCE, beside=[CAPTIONS_NAME]
    )


def read_texts(folder: Path, first: int, end: int) -> Iterator[str]:
    """Yields captions of a folder of `write_word_vectors` by their numbers, from first to end.

    Raises:
        ValueError: the file ends before.
    """
    path, number = folder / CAPTIONS_NAME, first
    with path.open(encoding="utf-8") as file:
        for line in islice(file, first, end):
            yield json.loads(line)
            number += 1
    if number < end:
        raise ValueError(
            f"{path} ends at caption {number} instead of {end}: it was cut; restore it"
        )


def read_captions(*readers: SampleReader) -> Iterator[SampleCaptions]:
    """Yields the captions of a data set, without decoding frames; none for a bad sample.

    Args:
        readers: Readers of the same data set, each of which a thread uses.

    Raises:
        OSError: the storage fails for the moment.
    """
    free, count = SimpleQueue[SampleReader](), len(readers[0])
    for reader in readers:
        free.put(reader)

    def read(rows: range) -> list[SampleCaptions]:
        reader = free.get()
        try:
            return [_captions_of(reader, row) for row in rows]
        finally:
            free.put(reader)

    pending = deque[Future[list[SampleCaptions]]]()
    with ThreadPoolExecutor(len(readers), "captions") as pool:
        try:
            for first in range(0, count, READ_ROWS):
                pending.append(pool.submit(read, range(first, min(first + READ_ROWS, count))))
                if len(pending) > 2 * len(readers):
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for each in pending:
                each.cancel()


def _captions_of(reader: SampleReader, row: int) -> SampleCaptions:
    try:
        meta = parse_meta(reader.key(row), reader.members(row))
    except BadSample as bad:
        if bad.reason in TRANSIENT_REASONS:
            raise OSError(
                f"{reader.url}: the captions for data.hard_batches cannot be read: {bad}"
            ) from bad
        return SampleCaptions("", ())
    return SampleCaptions(meta.video_id, meta.texts)


def find_word_vectors(url: str, manifest: Manifest, folder: Path) -> None:
    """Reads the captions of the data set at `url`, and writes their vectors; see above.

    Raises:
        ValueError: the data set is a beton, whose captions are not read one by one.
        OSError: see `read_captions` and `write_word_vectors`.
    """
    if manifest.beton is not None:
        raise ValueError(
            f"data.hard_batches cannot read the captions of {url}, which is a beton; train from the"
            " shards that it was written from"
        )
    reader = SampleReader(url, num_frames=1, image_size=1)
    readers = [reader, *(reader.for_another_thread() for _ in range(READERS - 1))]
    write_word_vectors(folder, read_captions(*readers), content=manifest.content)


def _sign_bits(word: str) -> np.ndarray:
    """(WIDTH / 8,) uint8."""
    content = word.encode(errors="surrogatepass")
    return np.frombuffer(hashlib.blake2b(content, digest_size=WIDTH // 8).digest(), np.uint8)


def _parts(
    tokens: tuple[np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray, np.ndarray],
    idf: np.ndarray,
    signs: np.ndarray,
) -> Iterator[CaptionRows]:
    (words, ends), (texts, videos, num_captions) = tokens, columns
    starts = np.append(0, np.cumsum(num_captions, dtype=np.int64))
    for first in range(0, len(videos), ROWS):
        end = min(first + ROWS, len(videos))
        captions = range(int(starts[first]), int(starts[end]))
        vectors = np.zeros((len(captions), WIDTH), np.int8)
        for at in range(0, len(captions), ROWS):
            here = slice(captions.start + at, min(captions.start + at + ROWS, captions.stop))
            bounds = ends[here.start : here.stop + 1].astype(np.int64)
            own = words[bounds[0] : bounds[-1]]
            vectors[at : at + ROWS] = _vectors(own, bounds - bounds[0], idf, signs)
        yield CaptionRows(
            vectors,
            texts[captions.start : captions.stop],
            videos[first:end],
            num_captions[first:end].astype(np.int64),
        )


def _vectors(
    words: np.ndarray, bounds: np.ndarray, idf: np.ndarray, signs: np.ndarray
) -> np.ndarray:
    """The vectors of captions whose words lie end to end, (captions, WIDTH) int8."""
    vectors = np.zeros((len(bounds) - 1, WIDTH), np.float32)
    has_words = np.flatnonzero(np.diff(bounds))
    if len(has_words):
        plus = np.unpackbits(signs[words], axis=1).astype(np.float32) * 2 - 1
        weighted = plus * idf[words, None].astype(np.float32)
        vectors[has_words] = np.add.reduceat(weighted, bounds[has_words])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled = vectors * (LENGTH / np.maximum(lengths, 1e-9))
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)
