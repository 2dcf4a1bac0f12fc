"""The command line of `tvr serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro

from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.exit_reporting import run_training_command

if TYPE_CHECKING:
    from tvr.trainer.checkpoint.choice import CheckpointChoice

NO_PROTECTION = (
    "warning: {host} can be reached from other machines, and the service knows no users and no"
    " encryption: everyone who reaches it can search and watch; put a reverse proxy before it"
)
NEEDED = ("fastapi", "uvicorn")

Features: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURES")]


def serve(argv: Sequence[str]) -> int:
    """`tvr serve`."""

    def arguments(
        index: Features,
        *,
        model: Path | None = None,
        checkpoint: str = "newest",
        host: str = "127.0.0.1",
        port: int = 8080,
        allow_host: tuple[str, ...] = (),
        search_threads: int = 4,
        timeout_s: float = 10.0,
        verify: bool = False,
    ) -> int:
        """Serves an index over HTTP: a search page, and the same as JSON.

        The service knows no users and no encryption.

        Args:
            index: Folder of the feature set that `tvr index` made searchable.
            model: Model that encoded the features, if `tvr index --model` did not name it.
            checkpoint: Of a run with --model: newest, best, or the number of a step.
            host: Address to listen on. Others than the loopback interface let other machines in.
            port: Port to listen on; 0: a free one, which is printed.
            allow_host: Names under which the service may be asked for, such as a reverse proxy's.
                Without it: names of this machine on the loopback interface, any name elsewhere.
            search_threads: Searches that run at once.
            timeout_s: Time of one search.
            verify: Compares the hashes of all files of the index first.
        """
        if not 0 <= port <= 65535:
            raise ValueError(f"--port {port} must be 0 to 65535")
        if model is None and checkpoint != "newest":
            raise ValueError(f"--checkpoint {checkpoint} needs --model")
        if search_threads < 1 or not timeout_s > 0:
            raise ValueError(
                f"--search-threads {search_threads} and --timeout-s {timeout_s} must be above 0"
            )
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"tvr serve needs {' and '.join(missing)}: pip install 'tvr[serve,search]'"
            )
        from tvr.trainer.checkpoint.choice import parse_choice

        choice = parse_choice(checkpoint)
        return _serve(
            index, model, choice, host, port, allow_host, search_threads, timeout_s, verify
        )

    return run_training_command(
        "serve", lambda: tyro.cli(arguments, prog="tvr serve", args=list(argv))
    )


def _serve(
    folder: Path,
    model: Path | None,
    checkpoint: CheckpointChoice,
    host: str,
    port: int,
    allow_host: tuple[str, ...],
    search_threads: int,
    timeout_s: float,
    verify: bool,
) -> int:
    from tvr.trainer.index.index import Index
    from tvr.trainer.service.app import LOOPBACK_NAMES, create_app
    from tvr.trainer.service.http_server import address, is_loopback, listening, run_server
    from tvr.trainer.service.records import Limits

    # Taken first: a port in use is known before the model is loaded.
    with (
        listening(host, port) as server,
        Index.open(folder, model=model, checkpoint=checkpoint, verify=verify) as index,
    ):
        # Loads the model: the first search should not wait, and errors belong here. This also sets
        # the tokeniser's length, which two threads must not do at once.
        index.search("a", k=1)
        is_local = is_loopback(server)
        if not is_local:
            print(NO_PROTECTION.format(host=host), file=sys.stderr)
        limits = Limits(search_threads=search_threads, search_s=timeout_s)
        names = LOOPBACK_NAMES | set(allow_host) if is_local else frozenset(allow_host) or None
        folders = {folder.resolve(), index.features.folder.resolve()}
        app = create_app(index, folders, limits=limits, hosts=names)
        print(f"serving {len(index):,} videos at {address(server)}", flush=True)
        try:
            run_server(app, server)
        except KeyboardInterrupt:
            pass  # uvicorn has closed its connections
    return EXIT_DONE
