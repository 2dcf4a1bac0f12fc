"""The table of metrics, its text, and its endpoints: one for a node, or one for each rank."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from builders.clip_files import numbered_video
from builders.scraping import Samples, parse_samples, scrape
from builders.spawn import spawn
from builders.tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from tvr.data_prep.cli import pack
from tvr.data_prep.exporter.metrics_http import MetricsEndpoint, job_label
from tvr.data_prep.exporter.metrics_table import Metric, MetricTable, MetricValues
from tvr.data_prep.packing.pack import PackProgress
from tvr.data_prep.packing.pack_metrics import PACK_METRICS, serve_metrics
from tvr.trainer.config import Config, MetricsConfig
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.shared_memory import IN_MEMORY
from tvr.trainer.distributed.world import World
from tvr.trainer.dry_run.synthetic_step import random_batches
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import TextVideoModel, build_model, model_inputs
from tvr.trainer.monitoring.cli import markdown_page, metrics, rows
from tvr.trainer.monitoring.counters import RankCounters
from tvr.trainer.monitoring.flops import flops_per_pair, peak_flops, peak_line
from tvr.trainer.monitoring.metrics import METRICS
from tvr.trainer.monitoring.monitor import NodeMonitor
from tvr.trainer.monitoring.step_record import DATA_SET, StepRecord, log_event
from tvr.trainer.monitoring.writers import Writers

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"", "seconds", "bytes", "ratio", "pairs", "steps", "clips"}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"tvr_[a-z]+(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.unit in UNITS
    if metric.unit:
        assert metric.name.removesuffix("_total").endswith(metric.unit)
    assert metric.meaning.endswith(".")
    assert "rank" not in metric.labels
    for name, values in metric.labels.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        # The names of training sets depend on the run.
        assert len(set(values)) == len(values)
        assert bool(values) == (name != DATA_SET)
        assert all(re.fullmatch(r"[a-z0-9_]+", value) for value in values)


def test_the_page_and_the_command_list_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert metrics(["--markdown"]) == 0
    assert (
        capsys.readouterr().out == markdown_page() == (ROOT / "trainer" / "METRICS.md").read_text()
    )
    assert metrics([]) == 0
    shown = capsys.readouterr().out
    assert len(rows()) == len(METRICS)
    assert all(metric.name[:8] in shown for metric in METRICS)


TABLE = MetricTable(
    [
        Metric(name="tvr_a_value", kind="gauge", unit="", meaning="A."),
        Metric(name="tvr_b_total", kind="counter", unit="", meaning="B.", per="node"),
        Metric(
            name="tvr_c_total",
            kind="counter",
            unit="",
            meaning="C.",
            per="rank",
            labels={"part": ("x", "y")},
        ),
        Metric(name="tvr_d_value", kind="gauge", unit="", meaning="D.", per="rank"),
    ]
)


def test_a_node_exports_the_values_of_its_ranks_as_one_text() -> None:
    lines = {rank: np.empty(len(TABLE.slots)) for rank in (0, 1)}
    first, second = (MetricValues(TABLE, line) for line in lines.values())
    first.set("tvr_a_value", 1.5)
    second.set("tvr_a_value", 9)  # ignored: rank 0 exports the metrics of the run
    for values, more in ((first, 2), (second, 3)):
        values.add("tvr_b_total", more)
        values.add("tvr_c_total", 10 * more, "y")
    second.set("tvr_d_value", 7)
    found = parse_samples(TABLE.text(lines).decode())
    assert found == {
        ("tvr_a_value",): 1.5,
        ("tvr_b_total",): 5,
        ("tvr_c_total", "x", "0"): 0,
        ("tvr_c_total", "y", "0"): 20,
        ("tvr_c_total", "x", "1"): 0,
        ("tvr_c_total", "y", "1"): 30,
        ("tvr_d_value", "1"): 7,
    }
    first.set("tvr_a_value", None)
    assert ("tvr_a_value",) not in parse_samples(TABLE.text(lines).decode())
    # A node without rank 0 exports no metric of the run.
    assert "tvr_a_value" not in TABLE.text({1: lines[1]}).decode()


def test_an_endpoint_closes_after_a_scrape_of_the_final_values() -> None:
    texts = [b"first", b"second"]
    made: list[bytes] = []

    def text() -> bytes:
        made.append(texts[len(made)])
        return made[-1]

    endpoint = MetricsEndpoint(text, "127.0.0.1", 0)
    url = f"http://{endpoint.target}/metrics"
    # The text is made at most once a second.
    assert [scrape(url) for _ in range(3)] == ["first"] * 3
    closing = threading.Thread(target=endpoint.close)
    closing.start()
    assert endpoint._is_final.wait(10)
    assert scrape(url) == "second"
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(OSError):  # noqa: PT011 (the port is closed)
        scrape(url)


def test_an_endpoint_without_scrapes_closes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = MetricsEndpoint(lambda: b"", "127.0.0.1", 0)
    monkeypatch.setattr(
        endpoint._final_scraped, "wait", lambda _: pytest.fail("the endpoint waits")
    )
    endpoint.close()


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot be served at 127\.0\.0\.1:{port} .*port 0"):
            MetricsEndpoint(lambda: b"", "127.0.0.1", port)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/runs/demo/run", "demo/run"),
        ("/runs/demo/run/", "demo/run"),
        ("run", "here/run"),
        (".", "{above}/here"),
        ("s3://bucket/sets/train/", "sets/train"),
        ("s3://bucket", "bucket"),
    ],
)
def test_job_labels_contain_the_parent_folder(
    folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert job_label(folder) == name.format(above=tmp_path.name)


RECORD = StepRecord(
    step=3,
    epoch=0.5,
    loss=2.0,
    similarity_loss=1.5,
    tpm_cl_loss=None,
    penalty=0.25,
    hard_negatives_per_row=1.0,
    clamped_share=None,
    positive_similarity=0.5,
    hardest_similarity=0.25,
    equal_captions_per_row=0.5,
    dropped_per_row=None,
    learning_rate=0.1,
    encoder_learning_rate=0.01,
    gradient_norm=4.0,
    samples_per_s=20.0,
    data_wait_s=0.5,
    step_s=1.0,
    trained_s=1.0,
    quarantined=0,
    straggler_gap_s=None,
    slowest_rank=None,
)


class EndpointResult(NamedTuple):
    """Target files and scraped values that a rank finds with one setting of `metrics.endpoint`."""

    files: list[str]
    targets: list[dict[str, Any]]
    during: list[Samples]
    last: Samples | None
    files_after: list[str]


def serve_metrics_once(
    rank: int, world_size: int, config: Config, folder: Path
) -> dict[str, EndpointResult]:
    world = World(rank=rank, world_size=world_size, device=torch.device("cpu"))
    results = {}
    for endpoint in ("node", "rank", "none"):
        run_dir = folder / endpoint
        attempt = world.run_on_first(lambda run_dir=run_dir: begin_attempt(run_dir))
        settings = replace(config.metrics, endpoint=endpoint)
        monitor = NodeMonitor(replace(config, metrics=settings), run_dir, world)
        monitor.start(attempt, 0)
        (mine,) = {"node": [3], "rank": [2], "none": [1]}[endpoint]
        all_gather_rows(torch.ones(mine, 4), world, (mine, mine))
        counters = RankCounters(loading_s=0.5 + rank)
        counters.skipped.update({"checksum": 2, "unreadable": 1, "no_frames": 3})
        counters.reads.update({"local": 10 + rank, "store": rank})
        record = monitor.on_step(replace(RECORD, step_s=1.0 + rank), counters)
        assert counters.local_work_s == 0.5 + rank  # nothing was encoded
        assert set(log_event(record)) > set(log_event(RECORD))
        world.barrier()
        written = run_dir / "metrics"
        files = sorted(path.name for path in written.iterdir())
        targets = [json.loads((written / name).read_text())[0] for name in files]
        during = [parse_samples(scrape(url(target))) for target in targets]
        world.barrier()
        last, server = None, monitor._server
        closing = threading.Thread(target=monitor.close, kwargs={"succeeded": True})
        closing.start()
        if server is not None and server._endpoint is not None:
            assert server._endpoint._is_final.wait(10)
            last = parse_samples(scrape(f"http://{server._endpoint.target}"))
        closing.join(30)
        world.barrier()
        after = sorted(path.name for path in written.iterdir())
        results[endpoint] = EndpointResult(files, targets, during, last, after)
    return results


def test_a_node_is_no_target_while_its_writers_close(data: Path, tmp_path: Path) -> None:
    world = World(rank=0, world_size=1, device=torch.device("cpu"))
    monitor = NodeMonitor(tiny_config(data, metrics={"address": "127.0.0.1"}), tmp_path, world)
    monitor.start(begin_attempt(tmp_path), 0)
    (target,) = (tmp_path / "metrics").glob("*.json")
    seen = []

    class RecordingWriters(Writers):
        def close(self) -> None:
            seen.append((target.exists(), scrape(f"http://{address}")))

    (address,) = json.loads(target.read_text())[0]["targets"]
    monitor._writers = RecordingWriters(monitor._config, tmp_path, 0, 1)
    monitor.close(succeeded=True)
    ((is_target, last),) = seen
    assert not is_target
    assert parse_samples(last)["tvr_train_finished",] == 1


def url(target: dict[str, Any]) -> str:
    (address,) = target["targets"]
    return f"http://{address}/metrics"


def test_a_node_has_one_endpoint_or_one_for_each_rank_or_none(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, metrics={"address": "127.0.0.1"})
    first, second = spawn(serve_metrics_once, 2, config, tmp_path)
    host = socket.gethostname()
    # With "node" the ranks share an endpoint, which has a series for each.
    assert first["node"].files == [f"{host}.json"]
    assert first["node"].targets[0]["labels"] == {
        "run": f"{tmp_path.name}/node",
        "host": host,
        "__meta_tvr_host": "listens there only",
    }
    (during,) = first["node"].during
    assert second["node"].during == [during]
    assert during["tvr_train_step_seconds", "0"] == 1.0
    assert during["tvr_train_step_seconds", "1"] == 2.0
    assert during["tvr_train_step",] == 3
    assert during["tvr_train_finished",] == 0
    assert during["tvr_train_loss", "total"] == 2.0
    assert ("tvr_train_loss", "tpm_cl") not in during
    assert during["tvr_data_skipped_samples_total", "checksum"] == 2
    assert during["tvr_data_decode_failures_total",] == 4
    assert during["tvr_data_bad_samples_limit",] == config.data.max_bad
    assert during["tvr_data_reads_total", "local"] == 21
    assert during["tvr_data_reads_total", "store"] == 1
    assert during["tvr_data_loading_seconds_total", "1"] == 1.5
    # Of the 6 rows of 4 numbers, each of the 2 ranks received 3.
    assert during["tvr_train_received_bytes_total", "all_gather"] == 2 * 3 * 4 * 4
    assert first["node"].last is not None
    assert first["node"].last["tvr_train_finished",] == 1
    assert second["node"].last is None
    assert first["node"].files_after == [f"{host}.prom"]
    written = (tmp_path / "node" / "metrics" / f"{host}.prom").read_text()
    assert parse_samples(written) == first["node"].last
    # With "rank" each has its own endpoint; rank 0 exports the metrics of the run.
    names = [f"{host}-rank-{rank:05d}" for rank in (0, 1)]
    assert first["rank"].files == [f"{name}.json" for name in names]
    zero, one = first["rank"].during
    assert zero["tvr_train_step_seconds", "0"] == 1.0
    assert ("tvr_train_step_seconds", "1") not in zero
    assert one["tvr_train_step_seconds", "1"] == 2.0
    assert ("tvr_train_step",) in zero
    assert ("tvr_train_step",) not in one
    assert second["rank"].last is not None
    assert first["rank"].files_after == [f"{name}.prom" for name in names]
    # With "none" there is no endpoint, but a file with the last values.
    assert first["none"].files == []
    assert first["none"].files_after == [f"{host}.prom"]
    # Every series is in the table.
    keys = {(name, *labels) for metric in METRICS for name, labels in series_of(metric)}
    for found in (during, zero, one, parse_samples(written)):
        assert found.keys() <= keys


def series_of(metric: Metric) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and label values of a metric's series on two ranks, in the order of `samples`."""
    for labels in metric.series:
        for rank in ("0", "1") if metric.per == "rank" else ("",):
            named = dict(zip(metric.label_names, (*labels, rank), strict=False))
            yield metric.name, tuple(named[name] for name in sorted(named))


def test_restarts_and_goodput_cover_all_starts_of_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, metrics={"endpoint": "none"})
    world = World(rank=0, world_size=1, device=torch.device("cpu"))
    an_hour_ago = time.time() - 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: an_hour_ago)
        begin_attempt(tmp_path)
    # A copy of a run folder has new modification times.
    os.utime(tmp_path / "attempts" / "000001.json")
    left = tmp_path / "metrics" / "elsewhere.json"
    left.parent.mkdir()
    left.write_text("[]")  # from a host that is not part of this start
    monitor = NodeMonitor(config, tmp_path, world)
    monitor.start(begin_attempt(tmp_path), 0)
    record = monitor.on_step(replace(RECORD, trained_s=900.0), RankCounters())
    goodput = log_event(record)["goodput"]
    assert goodput == pytest.approx(0.25, abs=0.01)
    monitor.close(succeeded=False)
    (written,) = left.parent.iterdir()
    last = parse_samples(written.read_text())
    assert last["tvr_train_goodput_ratio",] == goodput
    assert last["tvr_train_restarts_total",] == 1
    assert last["tvr_train_finished",] == 0


def test_the_slowest_rank_is_the_straggler() -> None:
    counters = RankCounters()
    assert counters.straggler() == (None, None)
    counters.local_work_s = 1.0
    counters.local_work_by_rank_s = (0.0, 0.0, 0.0)  # gathered before the first step ended
    assert counters.straggler() == (None, None)
    counters.local_work_by_rank_s = (1.0, 4.5, 0.5)
    assert counters.straggler() == (4.0, 1)


def test_flops_agree_with_the_counter_of_torch(data: Path) -> None:
    config = tiny_config(data, metrics={"peak_tflops": 2.0})
    tokenizer = build_tokenizer(config.model, config.data)

    def built(config: Config) -> TextVideoModel:
        data = config.data
        return build_model(config.model, config.loss, tokenizer, num_frames=data.num_frames)

    model, rows = built(config), 1 + config.data.max_words
    before = torch.get_rng_state()
    found = flops_per_pair(model, config, world_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in model.parameters())
    # A loss has 16 pairs: a text's sentence and words are multiplied with the frames of each pair;
    # features are 16 numbers wide.
    similarity = 3 * 2 * 16 * rows * config.data.num_frames * 16
    (batch,) = islice(random_batches(config.data, config.model, config.train, tokenizer), 1)
    # Attention as plain products: torch does not count fused attention on a CPU.
    model.image_tower.set_attn_implementation("eager")
    model.text_tower.set_attn_implementation("eager")
    assert flops_per_pair(model, config, world_size=2) == found
    with FlopCounterMode(display=False) as counter:
        features = model(*model_inputs(batch, torch.device("cpu")))
        torch.stack(
            [x.sum() for x in features if x is not None and x.requires_grad]
        ).sum().backward()
    counted = counter.get_total_flops() / 8  # pairs
    assert 0.95 * counted < found - similarity < counted  # the small heads are not counted
    # The forward takes a little more than a third: pixels have no gradient in either case.
    frozen = replace(config, model=replace(config.model, freeze="both"))
    assert flops_per_pair(built(frozen), frozen, 2) - similarity == pytest.approx(
        (found - similarity) / 3, rel=0.06
    )
    assert peak_flops(config.metrics, config.train, torch.device("cpu")) == 2e12
    assert peak_line(config.metrics, config.train) == "MFU: relative to 2 TFLOP/s a rank"
    assert "the peak rate of a CPU; metrics.peak_tflops" in peak_line(MetricsConfig(), config.train)


def test_shared_memory_leaves_no_file() -> None:
    assert not list(IN_MEMORY.glob("tvr-metrics-*"))


def test_packing_exports_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[PackProgress] = []
    found: list[Samples] = []

    def scrape_until_closed(port: str) -> None:
        while True:
            try:
                found.append(parse_samples(scrape(f"http://127.0.0.1:{port}/metrics")))
            except OSError:
                return
            time.sleep(0.05)

    with serve_metrics(shown.append, 0) as report_progress:
        (port,) = re.findall(r"^metrics: http://.*:(\d+)/metrics$", capsys.readouterr().out)
        report_progress(PackProgress(num_done=3, num_clips=9, num_bytes=0))
        scraper = threading.Thread(target=scrape_until_closed, args=(port,))
        scraper.start()
        while not found:
            time.sleep(0.01)
        report_progress(
            PackProgress(
                num_done=5, num_clips=9, num_bytes=70, refused={"no_frames": 1}, adjusted={"pq": 2}
            )
        )
    scraper.join(10)
    assert [progress.num_done for progress in shown] == [3, 5]
    first, last = found[0], found[-1]
    assert first["tvr_pack_done_clips",] == 3
    assert first["tvr_pack_clips_total",] == 0
    assert last["tvr_pack_done_clips",] == 5
    assert last["tvr_pack_planned_clips",] == 9
    assert last["tvr_pack_clips_total",] == 2
    assert last["tvr_pack_bytes_total",] == 70
    assert last["tvr_pack_refused_clips_total", "no_frames"] == 1
    assert last["tvr_pack_adjusted_clips_total", "pq"] == 2
    assert abs(last["tvr_pack_last_clip_timestamp_seconds",] - time.time()) < 60
    keys = {(name, *labels) for metric in PACK_METRICS for name, labels in series_of(metric)}
    assert last.keys() == keys


def test_pack_prints_the_url_of_its_endpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_bytes(numbered_video(5))
    (tmp_path / "a.csv").write_text("video,caption\na.mp4,one\n")
    line = ["--annotations", str(tmp_path / "a.csv"), "--out", str(tmp_path / "data")]
    assert pack([*line, "--layout", "frames", "--num-frames", "3", "--metrics-port", "0"]) == 0
    # On loopback, unless --metrics-address says otherwise.
    assert re.match(r"metrics: http://127\.0\.0\.1:\d+/metrics\n", capsys.readouterr().out)
