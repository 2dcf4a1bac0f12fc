"""The search service on a real index: its page in a real browser, its API, a cut index, the
command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import schemathesis
from builders.browser import Browser, Tab, chromium
from builders.exhaustive import examples, further
from builders.served_index import FRAMES, SIDE, demo_index, served
from builders.service_client import ROUTES, get, metric, wait_until
from fastapi.testclient import TestClient
from hypothesis import given, settings
from schemathesis import GenerationMode

from tvr.data_prep.demo_clips import COLOURS, SHAPES
from tvr.launchers.cli import main
from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.index import index as index_module
from tvr.trainer.index.encoder import load_model
from tvr.trainer.index.index import Index
from tvr.trainer.index.layout import FOLDER as INDEX_FOLDER
from tvr.trainer.service import cli, http_server
from tvr.trainer.service.app import create_app
from tvr.trainer.service.records import Limits

# No test is about time: the machine may be busy.
SLOW = Limits(search_s=120, file_s=120)
QUERY = "a small red circle moves left slowly"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def index(folder: Path) -> Iterator[Index]:
    with Index.open(folder, verify=True) as index:
        yield index


@pytest.fixture(scope="module")
def url(index: Index, folder: Path) -> Iterator[str]:
    with served(create_app(index, [folder], limits=SLOW)) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


PAINTED = "new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)))"


def press(tab: Tab, *, x: float, y: float) -> None:
    tab.value(PAINTED)  # the browser drops input that comes before
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        button = "none" if kind == "mouseMoved" else "left"
        tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)


def test_a_reader_types_sees_results_plays_one_and_opens_its_explanation(
    url: str, index: Index, browser: Browser
) -> None:
    tab = browser.open(url)
    field = "document.querySelector('input[name=q]')"
    tab.wait_for(f"document.activeElement === {field}")
    tab.call("Page.bringToFront")
    tab.value(PAINTED)
    tab.call("Input.insertText", text=QUERY)
    tab.wait_for(f"{field}.value === {json.dumps(QUERY)}")
    enter = {"key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13}
    for kind in ("keyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, **enter)
    tab.wait_for("document.querySelectorAll('.hit').length === 12")
    hits = index.search(QUERY, k=12)
    keys = "[...document.querySelectorAll('.hit h2')].map((title) => title.innerText)"
    assert tab.value(keys) == [hit.key for hit in hits]
    assert tab.value(f"{field}.value") == QUERY
    # Eight videos with a picture each, and four moving pictures.
    pictures = "[...document.querySelectorAll('.hit img')]"
    assert tab.value(f"{pictures}.length") == 4
    tab.value(f"{pictures}.forEach((picture) => picture.scrollIntoView())")
    tab.wait_for(f"{pictures}.every((picture) => picture.naturalWidth === {SIDE})")

    video = "document.querySelector('video')"
    tab.value(f"{video}.scrollIntoView({{block: 'center'}})")
    left, bottom = tab.value(
        f"(({{left, bottom}}) => [left, bottom])({video}.getBoundingClientRect())"
    )
    press(tab, x=left + 25, y=bottom - 48)
    tab.wait_for(f"{video}.currentTime > 0.2")
    tab.wait_for(f"{video}.ended")
    assert tab.value(f"{video}.duration") == pytest.approx(2, abs=0.1)
    assert tab.value(f"{video}.videoWidth") == 64
    took = 'tvr_service_requests_total{route="/videos/{row}/%s",status="%d"}'
    wait_until(lambda: metric(url, took % ("thumbnail.jpg", 200)) == 8)
    assert metric(url, took % ("media", 206)) >= 1  # the browser asks for ranges
    assert metric(url, took % ("media", 200)) == 4

    tab.value("document.querySelector('.links a').click()")
    tab.wait_for(f"document.querySelectorAll('table.heat thead img').length === {FRAMES}")
    tab.wait_for(
        "[...document.querySelectorAll('table.heat img')].every((image) => image.naturalWidth)"
    )
    text = tab.value("document.body.innerText")
    assert QUERY in text
    assert hits[0].key in text
    assert {"circle", "moves", "left"} <= set(text.split())
    assert tab.errors() == []
    assert {urlsplit(address).netloc for address in tab.requested()} <= {urlsplit(url).netloc, ""}


@pytest.mark.parametrize("path", ROUTES)
def test_the_api_does_what_its_description_says(path: str, index: Index, folder: Path) -> None:
    app = create_app(index, [folder], limits=SLOW, hosts=None)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    assert {each.ok().path for each in schema.get_all_operations()} == set(ROUTES)
    operation = schema[path]["GET"]
    modes = [GenerationMode.POSITIVE]
    if operation.query or operation.path_parameters:
        modes.append(GenerationMode.NEGATIVE)
    statuses: Counter[int] = Counter()

    for mode in modes:

        @settings(max_examples=examples(8), deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            statuses[case.call_and_validate().status_code] += 1

        check()
    assert statuses[200] or statuses[404]
    assert statuses[422] or modes == [GenerationMode.POSITIVE]


def test_answers_are_those_of_the_index(index: Index, folder: Path) -> None:
    client = TestClient(create_app(index, [folder], limits=SLOW, hosts=None))
    found = client.get("/search", params={"q": QUERY, "k": 3}).json()
    assert [
        (hit["rank"], hit["key"], hit["data"], hit["row"], hit["similarity"])
        for hit in found["hits"]
    ] == [
        (hit.rank, hit.key, hit.data, hit.video, hit.similarity) for hit in index.search(QUERY, k=3)
    ]
    key, data = found["hits"][0]["key"], found["hits"][0]["data"]
    similar = client.get("/similar", params={"key": key, "data": data, "k": 5}).json()
    assert [hit["key"] for hit in similar["hits"]] == [
        hit.key for hit in index.search_key(key, data=data, k=5)
    ]
    video = folder.parent / "videos" / "clip-00003.mp4"
    row = index.row("clip-00003")
    assert client.get(f"/videos/{row}/media").content == video.read_bytes()
    row = found["hits"][0]["row"]
    why = client.get("/explain", params={"q": QUERY, "row": row}).json()
    assert why["score"] == pytest.approx(found["hits"][0]["similarity"], abs=2e-3)
    assert len(why["similarity"]) == len(why["words"])
    assert {len(line) for line in why["similarity"]} == {FRAMES}
    evil = "<script>alert(1)</script> circle"
    page = client.get("/explain/page", params={"q": evil, "row": row})
    assert "&lt;script&gt;alert(1)" in page.text
    assert "<script" not in page.text
    assert "script-src" not in page.headers["content-security-policy"]


def test_200_searches_at_once_give_the_results_of_one(url: str, index: Index) -> None:
    queries = [f"{colour} {shape}" for colour in COLOURS for shape in (*SHAPES, "thing")]
    expected = {text: [hit.key for hit in index.search(text, k=5)] for text in queries}
    sent = [queries[number % len(queries)] for number in range(200)]
    with ThreadPoolExecutor(200) as clients:
        answers = list(clients.map(lambda text: get(url, f"/search?k=5&q={quote(text)}"), sent))
    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) <= {200, 503}
    assert statuses[200] >= SLOW.search_threads + SLOW.search_queue
    for text, answer in zip(sent, answers, strict=True):
        if answer.status == 200:
            assert [hit["key"] for hit in json.loads(answer.body)["hits"]] == expected[text]
        else:
            answer.problem()
    assert get(url, "/healthz").status == 200


@pytest.mark.parametrize("name", ["frames.bin", *further("keys.bin", "coarse")])
def test_an_index_that_is_cut_short(name: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "features"
    shutil.copytree(folder, copy)
    files = [path for path in copy.rglob("*") if path.is_file() and path.suffix != ".json"]
    if name == "coarse":
        path = next(path for path in files if (copy / INDEX_FOLDER) in path.parents)
    else:
        path = next(path for path in files if path.name == name)
    content = path.read_bytes()
    with Index.open(copy) as index, served(create_app(index, [copy], limits=SLOW)) as url:
        for size in (len(content) // 2, 0):
            os.truncate(path, size)
            wait_until(lambda: get(url, "/healthz").status == 500)
            named = f"{path} has {size} bytes; it had {len(content)} when the service started"
            assert named.startswith(get(url, "/healthz").problem()["value"].split("... (")[0])
            # All but the frames is in memory.
            status = 500 if name == "frames.bin" else 200
            for route in ("/search?q=red", "/similar?key=clip-00001"):
                answer = get(url, route)
                assert answer.status == status
                if status == 500:
                    assert answer.problem()["error"].startswith("a file of the index is damaged")
                    assert answer.problem()["value"].startswith(f"{path}: {size} bytes instead of")
            page = get(url, "/?q=red")
            assert page.status == status
            assert (b"a file of the index is damaged" in page.body) == (status == 500)
            for route in ("/explain?q=red&row=0", "/videos/0/media", "/metrics"):
                assert get(url, route).status == 200
        with path.open("r+b") as file:  # the same file: a new one is refused
            file.write(content)
        wait_until(lambda: get(url, "/healthz").status == 200)
        assert get(url, "/search?q=red").status == 200


def run_service(
    line: list[str], monkeypatch: pytest.MonkeyPatch, use: Callable[[str], None]
) -> int:
    """Runs `tvr serve` in this process, uses it from a thread, and interrupts it."""
    found: list[BaseException] = []
    address = http_server.address

    def talk(url: str) -> None:
        try:
            use(url)
        except BaseException as error:
            found.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    def started(server: socket.socket) -> str:
        url = address(server)
        threading.Thread(target=talk, args=(url.replace("0.0.0.0", "127.0.0.1"),)).start()
        return url

    monkeypatch.setattr(http_server, "address", started)
    code = main(["serve", *line, "--port", "0"])
    assert not found, found
    return code


def test_the_command_serves_until_it_is_interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use(url: str) -> None:
        assert len(json.loads(get(url, "/search?q=red&k=3").body)["hits"]) == 3
        assert get(url, "/", headers={"Host": "search.example"}).status == 421

    assert run_service([str(folder), "--timeout-s", "120"], monkeypatch, use) == 0
    out = capsys.readouterr()
    assert out.out.startswith("serving 12 videos at http://127.0.0.1:")
    assert "warning" not in out.err

    def use_name(url: str) -> None:
        assert get(url, "/", headers={"Host": "search.example"}).status == 200
        assert get(url, "/", headers={"Host": "other.example"}).status == 421

    line = [str(folder), "--host", "0.0.0.0", "--allow-host", "Search.Example"]
    assert run_service(line, monkeypatch, use_name) == 0
    assert "warning: 0.0.0.0 can be reached from other machines" in capsys.readouterr().err


def test_a_model_that_weights_content_words_is_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> SourceModel:
        model = load_model(*given)
        return replace(model, tokenizer=replace(model.tokenizer, content_words=True))

    monkeypatch.setattr(index_module, "load_model", load)

    def use(url: str) -> None:
        assert get(url, "/search?q=a+red+circle").status == 200
        explained = get(url, "/explain?q=a+red+circle&row=0")
        assert json.loads(explained.body)["caption"] == "a red circle"

    assert run_service([str(folder), "--timeout-s", "120"], monkeypatch, use) == 0


def test_what_the_command_refuses(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*line: str) -> str:
        assert main(["serve", *line]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        return error

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: " in refused(str(folder), "--port", port)
    assert "--port 70000 must be 0 to 65535" in refused(str(folder), "--port", "70000")
    assert "--timeout-s 0.0" in refused(str(folder), "--timeout-s", "0")
    assert "--checkpoint best needs --model" in refused(str(folder), "--checkpoint", "best")
    assert "no.such.host.invalid" in refused(str(folder), "--host", "no.such.host.invalid")
    assert str(tmp_path) in refused(str(tmp_path), "--port", "0")
    for name in ("search.example:8080", "http://search.example", "*"):
        assert f"--allow-host {name!r} must be a name" in refused(str(folder), "--allow-host", name)
    monkeypatch.setattr(cli, "NEEDED", ("fastapi", "no_such_package"))
    assert "no_such_package: pip install 'tvr[serve,search]'" in refused(str(folder))
