"""Damaged archives of other tools: a sample that is indexed reads as tarfile reads it."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from random import Random

from builders.clip_files import numbered_video
from builders.fuzz.mutations import BYTE_CHANGES, mutate_bytes
from builders.fuzz.target import READ, SEEDS, Target, require

from tvr.data_prep.adoption.index_tar import ForeignTar
from tvr.data_prep.adoption.tar_pool import index_tars
from tvr.data_prep.dataset.foreign_samples import ForeignRules, translate_range
from tvr.data_prep.dataset.sample_codec import parse_meta

NUM_SAMPLES = 3


class ForeignTars(Target):
    """Archives of videos, captions and JSON, with headers of several kinds."""

    name = "foreign tars"
    share = 0.05

    @classmethod
    def make(cls, folder: Path) -> None:
        for name, form, stem in (
            ("pax.tar", tarfile.PAX_FORMAT, "0000{}_\u732b"),
            ("gnu.tar", tarfile.GNU_FORMAT, "a folder/" + "x" * 110 + "{}"),
        ):
            with tarfile.open(folder / SEEDS / name, "w", format=form) as archive:
                for number in range(NUM_SAMPLES):
                    fields = {
                        "caption": f"clip {number}",
                        "url": f"https://x/{number}",
                        "status": 1,
                    }
                    parts = {
                        "txt": f"the clip {number}".encode(),
                        "json": json.dumps(fields).encode(),
                        "mp4": numbered_video(2, first=number, bframes=0),
                    }
                    for extension, content in parts.items():
                        info = tarfile.TarInfo(f"{stem.format(number)}.{extension}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))

    def mutate(self, seed: str, chance: Random) -> bytes:
        content = self.seeds[seed]
        if chance.random() < 0.5:
            return mutate_bytes(content, chance, self.donors)
        # A changed header with the sum that it needs.
        headers = [at for at in range(0, len(content), 512) if content[at + 257 :][:5] == b"ustar"]
        at = chance.choice(headers)
        header = chance.choice(BYTE_CHANGES)(content[at : at + 512], chance, self.donors)
        header = bytearray(header[:512].ljust(512, b"\0"))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return content[:at] + bytes(header) + content[at + 512 :]

    def check(self, seed: str, content: bytes) -> str:
        (self.scratch / seed).write_bytes(content)
        tar = ForeignTar(name=seed, num_bytes=len(content), version="", always_prefix=False)
        rules = ForeignRules()
        try:
            ((_, record),) = index_tars(str(self.scratch), [tar], rules, processes=0)
        except MemoryError:  # which the processes of an adoption make a bad sample
            return "out_of_memory"
        plain = _plain_files(content)
        end = found = 0
        for file in record.files:
            assert file.samples is not None
            for row in range(len(file.samples)):
                start, length = int(file.samples.offset[row]), int(file.samples.length[row])
                require(end <= start, "two samples overlap")
                end, found = start + length, found + 1
                require(end <= len(content), "a sample ends after the file")
                part = content[start:end]
                require(zlib.crc32(part) == int(file.samples.crc32[row]), "another checksum")
                key = str(file.samples.key[row])
                members = translate_range(part, key, rules)
                texts = parse_meta(key, members).texts
                require(len(texts) == int(file.samples.num_captions[row]), "other captions")
                if plain is not None:
                    require(members["mp4"] in plain, "tarfile reads no such video")
                    known = {text.decode("utf-8", "replace") for text in plain if len(text) < 2000}
                    require(
                        any(texts[0] in " ".join(text.split()) for text in known),
                        f"tarfile reads no caption {texts[0]!r}",
                    )
        return READ if found == NUM_SAMPLES and not record.bad else "bad samples"


def _plain_files(content: bytes) -> set[bytes] | None:
    """Returns the contents of all files by tarfile; None if it cannot read the archive."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:", ignore_zeros=True) as archive:
            files = [archive.extractfile(each) for each in archive.getmembers() if each.isfile()]
            return {file.read() for file in files if file is not None}
    except (tarfile.TarError, ValueError, OSError, KeyError):
        return None
