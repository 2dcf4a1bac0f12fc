"""The search service on a real index: its page in a real browser, its API, a cut index, the
command."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import schemathesis
from builders.browser import Browser, chromium
from builders.html_page import Page
from builders.served_index import demo_index, served
from builders.service_client import get, metric, wait_until
from fastapi.testclient import TestClient
from hypothesis import given, settings
from schemathesis import GenerationMode

from tvr.launchers.cli import main
from tvr.trainer.index.index import Index
from tvr.trainer.service import http_server
from tvr.trainer.service.app import create_app

QUERY = "a small red circle moves left slowly"
ROUTES = ("/search", "/similar", "/videos/{row}/media", "/videos/{row}/thumbnail.jpg", "/explain")
ROUTES += ("/explain/page", "/healthz", "/metrics")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def index(folder: Path) -> Iterator[Index]:
    with Index.open(folder, verify=True) as index:
        yield index


@pytest.fixture(scope="module")
def url(index: Index, folder: Path) -> Iterator[str]:
    with served(create_app(index, [folder])) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_a_reader_types_sees_results_plays_one_and_opens_its_explanation(
    url: str, index: Index, browser: Browser
) -> None:
    tab = browser.open(url)
    tab.wait_for("document.activeElement === document.querySelector('input[name=q]')")
    tab.call("Page.bringToFront")
    tab.call("Input.insertText", text=QUERY)
    for kind in ("keyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", code="Enter")
    tab.wait_for("document.querySelectorAll('.hit').length === 12")
    hits = index.search(QUERY, k=12)
    keys = "[...document.querySelectorAll('.hit h2')].map((title) => title.innerText)"
    assert tab.value(keys) == [hit.key for hit in hits]
    assert tab.value("document.querySelector('input[name=q]').value") == QUERY
    # Eight videos with a picture each, and four moving pictures.
    pictures = "[...document.querySelectorAll('.hit img')]"
    assert tab.value(f"{pictures}.length") == 4
    tab.value(f"{pictures}.forEach((picture) => picture.scrollIntoView())")
    tab.wait_for(f"{pictures}.every((picture) => picture.naturalWidth === 64)")
    first = "document.querySelector('video')"
    tab.value(f"{first}.focus()")
    for kind in ("keyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key=" ", text=" ", code="Space")
    tab.wait_for(f"{first}.currentTime > 0.2")
    tab.wait_for(f"{first}.ended")
    assert tab.value(f"{first}.duration") == pytest.approx(2, abs=0.1)
    assert tab.value(f"{first}.videoWidth") == 64

    took = 'tvr_service_requests_total{route="/videos/{row}/%s",status="%d"}'
    assert metric(url, took % ("thumbnail.jpg", 200)) == 8
    assert metric(url, took % ("media", 206)) == 1  # the browser asks for ranges
    assert metric(url, took % ("media", 200)) == 4

    tab.value("document.querySelector('.links a').click()")
    tab.wait_for("document.querySelectorAll('table.heat thead img').length === 6")
    tab.wait_for(
        "[...document.querySelectorAll('table.heat img')].every((image) => image.naturalWidth)"
    )
    text = tab.value("document.body.innerText")
    assert QUERY in text
    assert hits[0].key in text
    assert {"red", "circle", "left"} <= set(text.split())
    assert tab.errors() == []
    assert {address.split("/")[2] for address in tab.requested()} <= {urlsplit(url).netloc, ""}
