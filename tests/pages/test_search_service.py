"""The search service over HTTP: its API as documented, hostile and excessive requests, faults."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import httpx
import numpy as np
import pytest
from builders.html_page import Page
from builders.served_index import MemoryHit, MemoryIndex, MemoryMedia, served
from builders.service_client import ROUTES, Answer, get, metric, wait_until
from fastapi.testclient import TestClient

from tvr.data_prep.records import BadSample
from tvr.data_prep.storage.storage_errors import StorageUnavailable
from tvr.trainer.service import http_server
from tvr.trainer.service.app import create_app
from tvr.trainer.service.records import Limits

EVIL = "<script>alert(1)</script>\"'><img src=x>"
KEYS = ["red-car", "blue-bird", "green-tree", EVIL]
NAMES = frozenset({"127.0.0.1", "testserver"})


class Gate:
    """Holds searches until it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.arrived = threading.Semaphore(0)

    def __call__(self) -> None:
        self.arrived.release()
        assert self.is_open.wait(60)


def client_of(index: MemoryIndex, folder: Path, **limits: float) -> TestClient:
    app = create_app(index, [folder], limits=Limits(**limits), hosts=NAMES)
    return TestClient(app)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(MemoryIndex(KEYS), tmp_path)


def test_search_and_more_like_this(client: TestClient) -> None:
    found = client.get("/search", params={"q": "red car", "k": 2}).json()
    assert [(hit["rank"], hit["key"], hit["row"]) for hit in found["hits"]] == [
        (1, "red-car", 0),
        (2, "blue-bird", 1),
    ]
    assert (found["method"], found["candidates"]) == ("exact", 200)
    first = found["hits"][0]
    assert (first["data"], first["start_s"], first["end_s"]) == ("set", 0.0, None)
    assert first["media"] == "videos/0/media"
    picture = client.get("/" + first["thumbnail"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content.startswith(b"\xff\xd8\xff")
    similar = client.get("/similar", params={"key": EVIL, "data": "set"}).json()
    assert similar["hits"][0]["key"] == EVIL
    health = client.get("/healthz").json()
    assert health == {"status": "ok", "videos": 4, "method": "exact", "model": "memory"}


@pytest.mark.parametrize(
    ("path", "status", "error", "value"),
    [
        ("/search", 422, "q: Field required", None),
        ("/search?q=+", 422, "q: String should match", " "),
        ("/search?q=%12%10", 422, "q: String should match", r"\u0012\u0010"),
        ("/search?q=a&k=0", 422, "k: Input should be greater", "0"),
        ("/search?q=a&k=101", 422, "k: Input should be less", "101"),
        ("/search?q=a&k=all", 422, "k: Input should be a valid integer", "all"),
        (f"/search?q={'a' * 1001}", 422, "q: String should have at most 1000", "aaaa"),
        ("/similar?key=blue", 404, "the index has no such video", "blue"),
        ("/similar?key=red-car&data=other", 404, "the index has no such video", "red-car"),
        ("/videos/4/media", 404, "the index has no such video", "row 4"),
        ("/videos/4/thumbnail.jpg", 404, "the index has no such video", "row 4"),
        ("/videos/-1/media", 422, "row: Input should be greater", "-1"),
        ("/videos/1e3/media", 422, "row: Input should be a valid integer", "1e3"),
        ("/explain?q=a&row=9", 404, "the index has no such video", "row 9"),
        ("/explain/page?q=a&row=" + "9" * 5000, 422, "row: ", "999"),
        ("/nothing", 404, "Not Found", "/nothing"),
    ],
)
def test_errors_say_what_is_wrong(
    client: TestClient, path: str, status: int, error: str, value: str | None
) -> None:
    response = client.get(path)
    answer = Answer(response.status_code, dict(response.headers), response.content)
    assert answer.status == status
    found = answer.problem()
    assert found["error"].startswith(error)
    assert found["allowed"]
    assert found["value"] is value or found["value"].startswith(value)


def test_only_reading_is_allowed(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE"):
        response = client.request(method, "/search")
        assert (response.status_code, response.headers["allow"]) == (405, "GET")
        assert response.json()["value"] == method


def test_other_names_of_the_host_are_refused(tmp_path: Path) -> None:
    # A page of another site reaches this machine through a name that it lets point here.
    client = client_of(MemoryIndex(KEYS), tmp_path)
    for name in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::1", ""):
        response = client.get("/search?q=red", headers={"host": name})
        assert response.status_code == 421, name
    for name in ("127.0.0.1", "127.0.0.1:8080", "TESTSERVER"):
        assert client.get("/search?q=red", headers={"host": name}).status_code == 200


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    index = MemoryIndex([EVIL, "turned\u202eback"])
    client = client_of(index, tmp_path)
    for path in ("/", "/?like=turned\u202eback", "/?" + urlencode({"q": EVIL, "k": 2})):
        response = client.get(path)
        assert response.status_code == 200
        assert EVIL not in response.text
        assert "\u202e" not in response.text
        page = Page(response.text)
        assert not {"script", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
        assert not [name for _, found in page.tags for name in found if name.startswith("on")]
        assert not re.findall(r"(?:src|href|action)=\"(?:[a-z]+:)?//", response.text)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "script-src" not in policy
        assert "unsafe" not in policy
    assert "&lt;script&gt;alert(1)" in response.text
    response = client.get("/?" + urlencode({"like": EVIL + "x"}))
    assert response.status_code == 404
    assert EVIL not in response.text


def test_the_api_page_needs_no_network(client: TestClient) -> None:
    response = client.get("/docs")
    for route in ROUTES:
        assert f"GET {route}" in response.text
    assert not re.findall(r"(?:src|href)=\"(?:[a-z]+:)?//", response.text)
    assert "<script" not in response.text
    assert client.get("/style.css").headers["content-type"] == "text/css; charset=utf-8"


@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_ranges_of_a_video(kind: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    media = MemoryMedia(
        path=path if kind == "file" else None, bytes=None if kind == "file" else content
    )
    client = client_of(MemoryIndex(KEYS, media_of=lambda video: media), tmp_path)

    def asked(wanted: str | None) -> httpx.Response:
        headers = {} if wanted is None else {"range": wanted}
        return client.get("/videos/1/media", headers=headers)

    whole = asked(None)
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-type"] == "video/mp4"
    size = len(content)
    for wanted, first, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=5-99999", 5, 100_000),
        ("bytes=255000-", 255_000, size),
        ("bytes=-10", size - 10, size),
        ("bytes=100-999999999", 100, size),
        (f"bytes=-{size + 5}", 0, size),
    ):
        part = asked(wanted)
        assert (part.status_code, part.content) == (206, content[first:end]), wanted
        assert part.headers["content-range"] == f"bytes {first}-{end - 1}/{size}"
        assert part.headers["content-length"] == str(end - first)
    for wanted in ("bytes=256000-", "bytes=9-5", "bytes=-0"):
        part = asked(wanted)
        assert part.status_code == 416
        assert part.headers["content-range"] == f"bytes */{size}"
        assert part.json()["value"] == wanted
    # RFC 9110 lets a server ignore what it does not know.
    for wanted in ("bytes=0-1,5-6", "frames=1-2", "bytes=", "bytes=-", "bytes=" + "9" * 5000):
        assert (asked(wanted).status_code, asked(wanted).content) == (200, content), wanted


def test_the_pictures_asked_for_last_stay_in_memory(tmp_path: Path) -> None:
    index, drawn = MemoryIndex(KEYS), []

    def frames(video: int) -> np.ndarray:
        drawn.append(video)
        return np.zeros((1, 8, 8, 3), np.uint8)

    index.frames = frames  # type: ignore[method-assign]
    client = client_of(index, tmp_path, thumbnails=2)
    for row in (0, 1, 0, 2, 0, 1):
        assert client.get(f"/videos/{row}/thumbnail.jpg").status_code == 200
    assert drawn == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("start_s", "end_s", "fragment", "shown"),
    [
        (0.0, math.nan, "", None),
        (30.0, math.nan, "#t=30.000", "from 30.0 s"),
        (0.0, 4.5, "#t=0.000,4.500", "0.0 to 4.5 s"),
        (12345.678, 12350.125, "#t=12345.678,12350.125", "12345.7 to 12350.1 s"),
    ],
)
def test_a_player_begins_and_ends_at_the_cut(
    tmp_path: Path, start_s: float, end_s: float, fragment: str, shown: str | None
) -> None:
    index = MemoryIndex(KEYS)
    hit = MemoryHit(
        rank=1, key="a", data="set", video=0, similarity=1, start_s=start_s, end_s=end_s
    )
    index.search = lambda query, *, k=10: [hit]  # type: ignore[method-assign]
    client = client_of(index, tmp_path)
    found = client.get("/search?q=a").json()["hits"][0]
    assert found["media"] == "videos/0/media" + fragment
    page = client.get("/?q=a").text
    assert shown is None or shown in page


def test_a_video_that_is_gone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    names = ["gone.mp4", "pipe.mp4", "folder.mp4"]
    index = MemoryIndex(
        KEYS, media_of=lambda video: MemoryMedia(path=tmp_path / names[video], bytes=None)
    )
    client = client_of(index, tmp_path / "nothing")
    for row in range(3):
        response = client.get(f"/videos/{row}/media")
        assert response.status_code == 410, names[row]
        assert response.json()["error"] == "the video can no longer be read"
    assert client.get("/?q=red").status_code == 200


def test_paths_lead_nowhere_but_to_videos(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    app = create_app(MemoryIndex(KEYS), [tmp_path], hosts=NAMES)
    places = ("..", "%2e%2e", "..%2f..", "%2e%2e%2f%2e%2e", "..%5c..", "....//", "%252e%252e")
    targets = ("etc/passwd", "etc%2fpasswd", "secret.txt", "app.py")
    starts = ("/", "/videos/", "/videos/0/", "/videos/0/media/", "/style.css/", "/docs/")
    paths = [
        f"{start}{place}/{place}/{target}"
        for start in starts
        for place in places
        for target in targets
    ]
    paths += [
        f"/videos/{quote(name, safe='')}/media" for name in ("/etc/passwd", "0\0", "file:///")
    ]
    paths += ["//etc/passwd", "/videos/0/media%00", "/videos/0;/media", "/videos/%30%2fmedia/x"]
    with served(app) as url:
        for path in paths:
            answer = get(url, path)
            assert answer.status in (404, 422), path
            answer.problem()
        assert get(url, "/healthz").status == 200


def test_requests_that_are_too_large(tmp_path: Path) -> None:
    app = create_app(MemoryIndex(KEYS), [tmp_path], hosts=NAMES)
    ten_mb = b"a" * 10_000_000
    with served(app) as url:
        long = get(url, "/search?q=" + "a" * 10_000_000)
        assert long.status == 400
        assert "at most 65536 bytes of URL and headers" in long.problem()["allowed"]
        headers = get(url, "/search?q=a", headers={"x": "a" * 10_000_000})
        assert headers.status == 400
        assert get(url, "/search?q=" + "a" * 60_000).status == 414
        assert get(url, "/search?q=" + "a" * 40_000).status == 422
        characters = quote("\N{GRINNING FACE}" * 1000)
        assert get(url, f"/search?q={characters}").status == 200
        for method in ("POST", "GET"):
            body = get(url, "/search?q=a", method, body=ten_mb)
            assert body.status == 413
            assert body.problem()["value"] == "10000000 bytes"
        chunks = get(url, "/search?q=a", "POST", body=iter([ten_mb]), encode_chunked=True)
        assert chunks.status == 413
        assert get(url, "/", body=b"not HTTP").status == 413
        assert get(url, "/healthz").status == 200


def test_what_is_no_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.2)
    app = create_app(MemoryIndex(KEYS), [tmp_path], hosts=NAMES)
    with served(app) as url:
        parts = urlsplit(url)
        for sent in (
            b"\x16\x03\x01\x02\x00",
            b"hello\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        ):
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as raw:
                raw.sendall(sent)
                raw.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: raw.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 400 "), (sent, answer)
        # A head that never ends, and a connection that says nothing.
        for sent in (b"GET /search?q=a HTTP/1.1\r\nHost: 127.0.0.1\r\n", b""):
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as raw:
                raw.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert raw.recv(65536) == b""
        assert get(url, "/healthz").status == 200


def test_200_searches_at_once(tmp_path: Path) -> None:
    gate = Gate()
    index = MemoryIndex(KEYS, before=gate)
    limits = Limits(search_threads=4, search_queue=60, search_s=60)
    app = create_app(index, [tmp_path], limits=limits, hosts=NAMES)
    with served(app) as url, ThreadPoolExecutor(200) as clients:
        sent = [clients.submit(get, url, f"/search?q=red+{number}") for number in range(200)]
        wait_until(lambda: sum(each.done() for each in sent) == 200 - 64)
        assert metric(url, "tvr_service_searches_in_flight ") == 64
        gate.is_open.set()
        answers = [each.result() for each in sent]
        assert Counter(answer.status for answer in answers) == {200: 64, 503: 136}
        for answer in answers:
            if answer.status == 503:
                assert answer.headers["retry-after"] == "1"
                assert answer.problem() == {
                    "error": "too many search requests wait",
                    "value": None,
                    "allowed": "4 at a time, 60 waiting",
                }
            else:
                assert json.loads(answer.body)["hits"][0]["key"] == "red-car"
        assert len(index.searched) == 64
        wait_until(lambda: metric(url, "tvr_service_searches_in_flight ") == 0)
        assert get(url, "/search?q=red").status == 200
        route = 'tvr_service_requests_total{route="/search",status="%d"}'
        assert metric(url, route % 200) == 65
        assert metric(url, route % 503) == 136
        assert metric(url, 'tvr_service_request_seconds_count{route="/search"}') == 201
        assert metric(url, "tvr_service_index_videos ") == 4


def test_a_search_that_takes_too_long(tmp_path: Path) -> None:
    gate = Gate()
    index = MemoryIndex(KEYS, before=gate)
    limits = Limits(search_threads=1, search_s=0.2)
    app = create_app(index, [tmp_path], limits=limits, hosts=NAMES)
    with served(app) as url:
        late = get(url, "/search?q=first")
        assert late.status == 504
        assert late.problem()["allowed"] == "0.2 s"
        waiting = get(url, "/search?q=second")
        assert waiting.status == 503
        assert waiting.headers["retry-after"] == "1"
        page = get(url, "/?q=third")
        assert (page.status, page.headers["retry-after"]) == (503, "1")
        assert b"no thread became free" in page.body
        gate.is_open.set()
        wait_until(lambda: get(url, "/search?q=red").status == 200)
        assert "second" not in index.searched  # it was taken back before it began


def test_clients_that_hang_up(tmp_path: Path) -> None:
    gate = Gate()
    index = MemoryIndex(KEYS, before=gate)
    limits = Limits(search_threads=1, search_s=60)
    app = create_app(index, [tmp_path], limits=limits, hosts=NAMES)
    with served(app) as url:
        parts = urlsplit(url)
        for query in ("first", "second"):
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as raw:
                head = f"GET /search?q={query} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
                raw.sendall(head.encode())
                if query == "first":
                    gate.arrived.acquire()
                wait_until(lambda: metric(url, "tvr_service_searches_in_flight "))
        left = 'tvr_service_requests_total{route="/search",status="499"}'
        wait_until(lambda: metric(url, left) == 2)
        gate.is_open.set()
        assert get(url, "/search?q=red").status == 200
        assert index.searched == ["first", "red"]


def test_clients_that_leave_a_video_and_a_video_that_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(bytes(20_000_000))
    index = MemoryIndex(KEYS, media_of=lambda video: MemoryMedia(path=path, bytes=None))
    app = create_app(index, [tmp_path / "no"], hosts=NAMES)
    with served(app) as url:
        parts = urlsplit(url)
        for is_cut in (False, True):
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as raw:
                raw.sendall(b"GET /videos/0/media HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert raw.recv(100).startswith(b"HTTP/1.1 200 OK")
                if is_cut:
                    os.truncate(path, 0)
                    while raw.recv(1 << 20):
                        pass
            wait_until(lambda: get(url, "/healthz").status == 200)
            wait_until(lambda: str(path) not in open_files())
    (record,) = [each for each in caplog.records if each.name == "tvr.service"]
    assert re.search("clip.mp4 ended at byte .* of 20000000 while it was sent", record.message)


def open_files() -> set[str]:
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(entry.path))
    return found


def test_errors_of_the_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = [
        StorageUnavailable("s3://bucket does not answer"),
        BadSample("red-car", "unreadable", "no frame"),
        RuntimeError("a bug"),
    ]

    def fail() -> None:
        raise errors.pop(0)

    client = client_of(MemoryIndex(KEYS, before=fail), tmp_path)
    statuses = [client.get("/search?q=red").status_code for _ in range(3)]
    assert statuses == [503, 410, 500]
    assert "a bug" in caplog.text  # with its traceback; the client gets its type only
    assert client.get("/healthz").status_code == 200


def test_files_that_come_and_go_while_the_service_starts(tmp_path: Path) -> None:
    # A builder that adds videos writes under a temporary name; a link may lead nowhere.
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert client_of(MemoryIndex(KEYS), tmp_path).get("/healthz").status_code == 200
