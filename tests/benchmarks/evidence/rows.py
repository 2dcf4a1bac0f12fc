"""The rows of the table: what is trained, as settings of `tvr train` that differ from the base.

All rows of a seed share the start, the order of the samples and every other setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST = "InfoNCE, wti"
"""The row that others are compared with."""
DMAE = "InfoNCE, att_wti (DMAE)"
FULL = "full method"
"""DMAE + NegNCE + TPM-CL: the row of the primary comparison."""

_DMAE = {"model.interaction": "att_wti", "loss.similarity": "info_nce", "loss.tpm_cl": 0}
_NEG_NCE = {**_DMAE, "loss.similarity": "neg_nce"}

ROWS: Mapping[str, Mapping[str, Any]] = {
    FIRST: {**_DMAE, "model.interaction": "wti"},
    DMAE: _DMAE,
    "NegNCE log": {**_NEG_NCE, "loss.neg_nce_mode": "log"},
    "NegNCE set": {**_NEG_NCE, "loss.neg_nce_mode": "set"},
    "NegNCE reference": {**_NEG_NCE, "loss.neg_nce_mode": "reference"},
    "DMAE + TPM-CL": {**_DMAE, "loss.tpm_cl": 4},
    FULL: {**_NEG_NCE, "loss.neg_nce_mode": "log", "loss.tpm_cl": 4},
    "full method, set": {**_NEG_NCE, "loss.neg_nce_mode": "set", "loss.tpm_cl": 4},
    "DMAE + hardness 0.5": {**_DMAE, "loss.hardness": 0.5},
    "DMAE + drop_above 0.1": {**_DMAE, "loss.drop_above": 0.1},
    "sigmoid": {**_DMAE, "loss.similarity": "sigmoid"},
    "DMAE, words to frames": {**_DMAE, "model.matching": "words_to_frames"},
    "full method + hard batches": {
        **_NEG_NCE,
        "loss.neg_nce_mode": "log",
        "loss.tpm_cl": 4,
        "data.hard_batches": 0.25,
    },
}


def slug(row: str) -> str:
    """The row's name as a file name."""
    return "".join(x if x.isalnum() else "-" for x in row.lower())


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"loss.tpm_cl": 0} -> {"loss": {"tpm_cl": 0}}"""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return found
