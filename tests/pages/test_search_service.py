"""The search service over HTTP: its API as documented, hostile and excessive requests, faults."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import pytest
import schemathesis
from builders.served_index import MemoryExplainer, MemoryIndex
from fastapi.testclient import TestClient
from hypothesis import given, settings
from schemathesis import GenerationMode

from tvr.trainer.service.app import create_app
from tvr.trainer.service.records import Limits

EVIL = "<script>alert(1)</script>\"'><img src=x>"
KEYS = ["red-car", "blue-bird", "green-tree", EVIL]
NAMES = frozenset({"127.0.0.1", "testserver"})


def client_of(index: MemoryIndex, folder: Path, **limits: float) -> TestClient:
    app = create_app(index, MemoryExplainer(), [folder], limits=Limits(**limits), hosts=NAMES)
    return TestClient(app)


def problem(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    found = response.json()
    assert set(found) == {"error", "value", "allowed"}
    return found


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(MemoryIndex(KEYS), tmp_path)


ROUTES = ("/search", "/similar", "/videos/{row}/media", "/videos/{row}/thumbnail.jpg", "/explain")
ROUTES += ("/explain/page", "/healthz", "/metrics")


@pytest.mark.parametrize("path", ROUTES)
def test_the_api_does_what_its_description_says(path: str, tmp_path: Path) -> None:
    app = create_app(MemoryIndex(KEYS), MemoryExplainer(), [tmp_path], hosts=None)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    assert {each.ok().path for each in schema.get_all_operations()} == set(ROUTES)
    operation = schema[path]["GET"]
    modes = [GenerationMode.POSITIVE]
    if operation.query or operation.path_parameters:
        modes.append(GenerationMode.NEGATIVE)
    statuses: Counter[int] = Counter()

    for mode in modes:

        @settings(max_examples=15, deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            statuses[case.call_and_validate().status_code] += 1

        check()
    assert statuses[200] or statuses[404]
    assert statuses[422] or modes == [GenerationMode.POSITIVE]
