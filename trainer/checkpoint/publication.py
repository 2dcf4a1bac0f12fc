"""Publishes checkpoints, sets damaged ones aside, and removes what no checkpoint needs.

Rank 0 of a run's newest attempt does this; every attempt and every save writes to a folder of its
own. That keeps the attempts apart, without renames or locks:

- An attempt checks before each write of a manifest, and each removal, that it is the newest.
- A manifest is created, not replaced: the late write of an older attempt cannot take the place of
  a newer manifest. If it comes first, the newer attempt removes it.
- Unpublished files of this and of older attempts are removed at a start and after each save, those
  of newer attempts never.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import (
    Retention,
    best_step,
    checkpoint_name,
    list_candidates,
    list_step_folders,
    read_latest,
    read_state,
    write_latest,
)
from tvr.trainer.checkpoint.manifest import (
    ATTEMPT_FOLDER,
    MANIFEST,
    MISSING_FILE_ERRORS,
    SavedState,
    create_manifest,
    read_manifest,
)
from tvr.trainer.fencing import Attempt

DAMAGED = "damaged.json"
# Hidden folders that earlier releases left on a local disk; all others belong to the user.
OLD_TEMPORARY = re.compile(r"\.+(damaged-)?step-\d{8,}(\.attempt-\d+\.partial)?(\.trash-\d+)*")
# Each round removes a manifest that an older attempt has just written.
PUBLISH_ROUNDS = 5

log = logging.getLogger(__name__)


class Publisher:
    """The published checkpoints of one storage, as one attempt changes them."""

    def __init__(self, storage: StorageFolder, attempt: Attempt, retention: Retention) -> None:
        self._storage = storage
        self._attempt = attempt
        self._retention = retention
        self._folders: dict[int, str] = {}
        """Folder of the files of each published checkpoint, by step."""
        self._lost: int | None = None
        """The step that `latest` names although it had no manifest, until it is set aside."""

    def begin(self) -> None:
        """Reads which checkpoints there are, and removes unfinished saves of earlier attempts."""
        self._attempt.check()
        latest = read_latest(self._storage)
        for step in list_candidates(self._storage):
            state, lines = read_state(self._storage, step)
            if state is not None:
                self._folders[step] = state.folder
            elif step == latest and not lines:
                self._lost = step
        try:
            for name in self._storage.list_names():
                if OLD_TEMPORARY.fullmatch(name):
                    self._storage.remove(name)
            self._collect()
        except OSError as error:
            # For example, a process that still writes there. The next save tries again.
            log.warning("files of earlier attempts could not be removed: %s", error)

    def publish(self, state: SavedState) -> None:
        """Turns the written files in `state.folder` into the newest checkpoint.

        Raises:
            OSError: it could not be published.
            Fenced: a newer attempt at the run has begun.
        """
        name = checkpoint_name(state.step)
        for last in (False,) * PUBLISH_ROUNDS + (True,):
            try:
                create_manifest(self._storage, name, state, self._attempt.check)
                break
            except FileExistsError:
                if last:
                    raise
                self._remove_manifest(state.step)
        self._folders[state.step] = state.folder
        try:
            self._attempt.check()
            write_latest(self._storage, name)
            self._prune()
            self._collect()
        except OSError as error:
            # The checkpoint is published. The next save removes the old ones again.
            log.warning("%s is saved, but old checkpoints could not be removed: %s", name, error)

    def discard(self, step: int) -> None:
        """Removes the files of a failed save."""
        # Writing also fails if a newer attempt has removed this one's files.
        self._attempt.check()
        try:
            self._collect_step(step)
        except OSError:
            pass  # The disk has failed. The next save or attempt removes the files.

    def set_aside(self, damaged: Mapping[int, Sequence[str]], newest: int) -> None:
        """Takes damaged checkpoints out of use; their files stay for inspection.

        damaged.json keeps the errors, and the content of the manifest, which is removed.

        Args:
            damaged: Lines that describe the errors, by step.
            newest: Step of the newest intact checkpoint.
        """
        for step, lines in damaged.items():
            self._attempt.check()
            name = checkpoint_name(step)
            try:
                manifest = self._storage.read(f"{name}/{MANIFEST}").decode(errors="replace")
            except MISSING_FILE_ERRORS:
                manifest = None
            entries = [entry for entry in self._storage.list_names(name) if entry != MANIFEST]
            record = {"errors": list(lines), "entries": entries, "manifest": manifest}
            content = (json.dumps(record, indent=1) + "\n").encode()
            self._storage.write_atomically(f"{name}/{DAMAGED}", content)
            self._remove_manifest(step)
            self._lost = None if step == self._lost else self._lost
        if damaged:
            write_latest(self._storage, checkpoint_name(newest))

    def _prune(self) -> None:
        """Ends the checkpoints that retention does not keep; `_collect` removes their files."""
        # Of the published ones: the save of a step that scored higher may have failed.
        best = best_step(self._storage, self._folders) if self._retention.best else None
        for step in self._retention.expired_steps(self._folders, best):
            self._remove_manifest(step)

    def _remove_manifest(self, step: int) -> None:
        self._storage.remove_file(f"{checkpoint_name(step)}/{MANIFEST}", self._attempt.check)
        self._folders.pop(step, None)

    def _collect(self) -> None:
        for step in list_step_folders(self._storage):
            if step != self._lost:
                self._collect_step(step)

    def _collect_step(self, step: int) -> None:
        """Removes the files in a step's folder that no checkpoint and no newer attempt needs."""
        name = checkpoint_name(step)
        found = self._storage.list_names(name)
        entries = [entry for entry in found if entry != MANIFEST]
        if step not in self._folders and not self._is_unpublished(step):
            return
        published = self._folders.get(step)
        if published is not None and entries == [published]:
            return
        kept = {published, *self._set_aside_entries(name)}
        removed = [
            entry for entry in entries if entry not in kept and self._is_removable(entry, published)
        ]
        # One by one: a newer attempt may write to this folder at any moment.
        for entry in removed:
            self._storage.remove(f"{name}/{entry}", self._attempt.check)
        if removed == found:
            self._storage.remove_empty(name)

    def _is_unpublished(self, step: int) -> bool:
        """True if a step that this attempt did not publish has no manifest, or loses it here."""
        try:
            state = read_manifest(self._storage, checkpoint_name(step))
        except MISSING_FILE_ERRORS:
            return True
        except ValueError:
            return False  # damaged; the next start sets it aside
        match = ATTEMPT_FOLDER.fullmatch(state.folder)
        if match is None or int(match[1]) >= self._attempt.number:
            return False
        # An older attempt published it after this one began, which may have removed its files.
        log.warning("%s: attempt %s published it too late", checkpoint_name(step), match[1])
        self._remove_manifest(step)
        return True

    def _is_removable(self, entry: str, published: str | None) -> bool:
        match = ATTEMPT_FOLDER.fullmatch(entry)
        if match is None:
            # Files of format version 1, which are published if `published` is the step's folder.
            return published != "" and entry != DAMAGED
        return int(match[1]) <= self._attempt.number

    def _set_aside_entries(self, name: str) -> list[str]:
        """The entries of a step's folder that belong to a checkpoint that was set aside."""
        try:
            record = json.loads(self._storage.read(f"{name}/{DAMAGED}"))
            return [DAMAGED, *record["entries"]]
        except MISSING_FILE_ERRORS:
            return []
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s/%s is damaged, all files there stay: %r", name, DAMAGED, error)
            return self._storage.list_names(name)
