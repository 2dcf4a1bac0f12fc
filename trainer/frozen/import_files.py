"""Takes in features that a user brings, for the clips of a packed data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.sample_codec import parse_meta
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import TRANSIENT_REASONS, BadSample, Caption, Replacement
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.features.feature_set import (
    OUTPUT,
    FeatureHeader,
    FeatureWriter,
    StoredType,
    VideoSource,
)
from tvr.trainer.frozen.encoding import Report
from tvr.trainer.frozen.feature_files import FileFeatures, read_file
from tvr.trainer.frozen.identity import packed_source
from tvr.trainer.model.features import IMPORTED, Features
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.model.tower_folders import load_text_encoder

CONFIG = "config.json"
TEXTS_AT_ONCE = 64
EncodeTexts = Callable[[Sequence[Caption]], tuple[Tensor, Tensor, Tensor]]
"""Captions -> sentence (A, W), words (A, T, W), word_mask (A, T)."""


@dataclass(frozen=True, slots=True)
class _Read:
    key: str
    row: int
    captions: tuple[Caption, ...]
    features: FileFeatures


def import_features(
    data: str,
    files: Path,
    out: Path,
    *,
    name: str,
    num_frames: int,
    max_words: int,
    text_tower: str | None = None,
    stored: StoredType = "fp32",
    max_bad: int = 100,
    report: Report | None = None,
) -> int:
    """Writes the features of a data set's clips into a folder for `data.features`.

    The same call again continues where one was stopped. Other data sets with features of the same
    encoders may follow into the same folder.

    Args:
        data: Folder or URL of the packed data set: keys, captions and order are its own.
        files: Folder with a file a clip, see `feature_files`.
        out: Folder of the feature set.
        name: Name of the encoders, by which later calls are compared.
        num_frames: Most frames of a clip.
        max_words: Word slots of a caption; longer captions are cut.
        text_tower: Folder of a text encoder, by which captions are encoded here; None takes them
            from the files.
        max_bad: Allowed number of clips whose file is bad; these are left out.

    Returns:
        The number of clips that were left out.

    Raises:
        ValueError: `out` holds features of other encoders, sizes or content; or no file is good.
        TooManyBadSamples: more bad files than `max_bad`.
    """
    reader = SampleReader(data, num_frames=1, image_size=1)
    encode, vocab_size = _text_source(text_tower, out, max_words)
    header = _header(reader, files, name, num_frames, max_words, text_tower, encode, stored)
    _write_settings(out, header, vocab_size)
    source = packed_source(data)
    writer = FeatureWriter(out, header, source)
    budget = BadSampleBudget(max_bad, f"while importing {files}", max_unavailable_in_a_row=1)
    left_out = 0
    for block in range(source.num_blocks):
        rows = [len(reader) * each // source.num_blocks for each in (block, block + 1)]
        if not writer.has(block):
            left_out += _write_block(writer, block, range(*rows), reader, files, encode, budget)
        if report is not None:
            report(data, block + 1, source.num_blocks, left_out)
    writer.publish()
    return left_out


def _write_block(
    writer: FeatureWriter,
    block: int,
    rows: range,
    reader: SampleReader,
    files: Path,
    encode: EncodeTexts | None,
    budget: BadSampleBudget,
) -> int:
    good: list[_Read] = []
    left_out: list[Replacement] = []
    for row in rows:
        try:
            good.append(_read(reader, row, files, writer.header, has_texts=encode is None))
        except BadSample as bad:
            budget.record_bad(bad.key, bad.reason, bad.detail)
            if bad.reason in TRANSIENT_REASONS:
                raise budget.exhausted_error() from bad
            left_out.append(
                Replacement(position=row, key=bad.key, reason=bad.reason, detail=bad.detail)
            )
    captions = [caption for each in good for caption in each.captions]
    writer.write(
        block,
        _joined(good, captions, encode, writer.header) if good else None,
        keys=[each.key for each in good],
        captions=[caption.text for caption in captions],
        caption_video=torch.tensor(
            [index for index, each in enumerate(good) for _ in each.captions], dtype=torch.int64
        ),
        sources=[VideoSource(row=each.row) for each in good],
        left_out=left_out,
    )
    return len(left_out)


def _read(
    reader: SampleReader, row: int, files: Path, header: FeatureHeader, *, has_texts: bool
) -> _Read:
    key = reader.key(row)
    captions = parse_meta(key, reader.members(row)).captions
    found = read_file(files, key, num_frames=header.num_frames)
    width = header.frame_width or header.width
    if found.frames.shape[1] != width:
        raise BadSample(
            key, "unreadable", f"frames are {found.frames.shape[1]} wide, those before {width}"
        )
    if has_texts:
        words, mask = found.words, found.word_mask
        if words is None or mask is None:
            raise BadSample(
                key, "unreadable", "its file holds no words, and there is no text tower"
            )
        if len(words) != len(captions) or words.shape[2] != header.width:
            raise BadSample(
                key,
                "unreadable",
                f"words are {tuple(words.shape)}; needed are {len(captions)} captions,"
                f" {header.width} wide",
            )
        if not bool(mask[:, : header.num_words].any(dim=1).all()):
            raise BadSample(
                key,
                "unreadable",
                f"a caption has no words in its first {header.num_words} slots (--max-words), at"
                " which longer ones are cut; put the words first",
            )
    return _Read(key, row, captions, found)


def _joined(
    good: Sequence[_Read],
    captions: Sequence[Caption],
    encode: EncodeTexts | None,
    header: FeatureHeader,
) -> Features:
    width = header.frame_width or header.width
    frames = torch.zeros(len(good), header.num_frames, width)
    frame_mask = torch.zeros(len(good), header.num_frames, dtype=torch.int64)
    for index, each in enumerate(good):
        count = len(each.features.frames)
        frames[index, :count], frame_mask[index, :count] = each.features.frames, 1
    if encode is not None:
        parts = [
            encode(captions[start : start + TEXTS_AT_ONCE])
            for start in range(0, len(captions), TEXTS_AT_ONCE)
        ]
        sentence, words, word_mask = (torch.cat(column) for column in zip(*parts, strict=True))
    else:
        sentence = torch.cat([_known(each.features.sentence) for each in good])
        words = torch.zeros(len(captions), header.num_words, header.width)
        word_mask = torch.zeros(len(captions), header.num_words, dtype=torch.int64)
        first = 0
        for each in good:
            found, mask = _known(each.features.words), _known(each.features.word_mask)
            count = min(found.shape[1], header.num_words)
            here = slice(first, first + len(found))
            words[here, :count], word_mask[here, :count] = found[:, :count], mask[:, :count]
            first += len(found)
    return Features(
        sentence=sentence,
        words=words,
        word_mask=word_mask,
        frames=frames,
        frame_mask=frame_mask,
        word_logits=None,
        frame_logits=None,
        margin_hinge=None,
    )


def _known(values: Tensor | None) -> Tensor:
    assert values is not None, "files without texts were left out"
    return values


def _text_source(folder: str | None, out: Path, max_words: int) -> tuple[EncodeTexts | None, int]:
    """What encodes captions, None if files bring their texts; writes a tokeniser into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if folder is None:
        # Nothing is tokenised: a run only asks a tokeniser for its special tokens.
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]"}
        special["eos_token"] = "[SEP]"
        words = {token: index for index, token in enumerate(special.values())}
        backend = BackendTokenizer(models.WordLevel(words, unk_token="[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(out)
        return None, len(words)
    tokenizer = load_tokenizer(folder, max_words)
    run, positions = load_text_encoder(folder)
    if max_words > positions:
        raise ValueError(f"max_words={max_words} exceeds the {positions} positions of {folder}")
    tokenizer.backend.save_pretrained(out)

    def encode(captions: Sequence[Caption]) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = tokenizer(captions)
        with torch.no_grad():
            sentence, words = run(ids, mask)
        return sentence, words, mask

    return encode, tokenizer.vocab_size


def _header(
    reader: SampleReader,
    files: Path,
    name: str,
    num_frames: int,
    max_words: int,
    text_tower: str | None,
    encode: EncodeTexts | None,
    stored: StoredType,
) -> FeatureHeader:
    """Describes the features, whose widths are those of the first good file."""
    width, text_width = None, None
    problem = "it is empty"
    for row in range(len(reader)):
        key = reader.key(row)
        try:
            found = read_file(files, key, num_frames=num_frames)
        except BadSample as bad:
            problem = str(bad)
            continue
        width = found.frames.shape[1]
        text_width = None if found.words is None else found.words.shape[2]
        if encode is not None:
            text_width = encode([Caption(text="a")])[0].shape[1]
        if text_width is not None:
            break
        problem = f"{key}: its file holds no words, and there is no text tower (--text-tower)"
    if width is None or text_width is None:
        raise ValueError(f"{files} holds no good file for {reader.url}: {problem}")
    settings = {
        OUTPUT: IMPORTED,
        "texts": "of the files" if text_tower is None else Path(text_tower).name,
        "num_frames": num_frames,
        "max_words": max_words,
    }
    text = json.dumps([name, width, text_width, settings], sort_keys=True)
    return FeatureHeader(
        model=name,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        settings=settings,
        stored=stored,
        num_frames=num_frames,
        num_words=max_words,
        width=text_width,
        has_logits=False,
        frame_width=width,
    )


def _write_settings(out: Path, header: FeatureHeader, vocab_size: int) -> None:
    """Writes config.json, by which the folder serves as `model.pretrained`."""
    content = {
        "model_type": IMPORTED,
        "name": header.model,
        "fingerprint": header.fingerprint,
        "text_width": header.width,
        "frame_width": header.frame_width,
        "num_frames": header.num_frames,
        "max_words": header.num_words,
        "vocab_size": vocab_size,
    }
    path = out / CONFIG
    if path.is_file() and json.loads(path.read_text()) != content:
        raise ValueError(f"{path} is of other features: {path.read_text()}; give another folder")
    write_atomically(path, json.dumps(content, indent=1) + "\n")
