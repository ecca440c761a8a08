"""Alerts: the rules, and the three places where they end."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import pytest
import torch

from pipeline.config import RunConfig, TrainConfig
from pipeline.monitor.feed import Feed
from pipeline.reporting.alerts import FILE_VARIABLE, URL_VARIABLE, Alerts, AlertsConfig, webhook_address
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import VAL_TAGS
from pipeline.training.loop import NonFiniteLossError, run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.storage import open_storage

SECRET = "/services/hush"


@pytest.fixture(autouse=True)
def no_webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (URL_VARIABLE, FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


class Hook(ThreadingHTTPServer):
    """A webhook that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: Queue[tuple[str, dict[str, object]]] = Queue()
        self.status = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.sent.put((self.path, json.loads(body)))
                self.send_response(hook.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}{SECRET}"


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_quality_below_the_limit_speaks_once_until_it_recovers() -> None:
    notes: list[tuple[int, str]] = []
    alerts = Alerts(AlertsConfig(psnr_below=20), "runs/a", lambda step, text: notes.append((step, text)))
    for step, psnr in enumerate((25, 19, 18, 21, 19), 1):
        alerts.validated(step, {"val/psnr": float(psnr)})
    alerts.close()
    assert [step for step, _ in notes] == [2, 5]
    assert notes[0][1] == "    runs/a, step 2: validation PSNR is 19 dB, below alerts.psnr_below = 20"
    silent = Alerts(AlertsConfig(), "runs/a", lambda step, text: notes.append((step, text)))
    silent.validated(1, {"val/psnr": -5.0})
    silent.close()
    assert len(notes) == 2


def test_a_quality_that_is_no_number_speaks_as_a_poor_one_does() -> None:
    notes: list[tuple[int, str]] = []
    alerts = Alerts(AlertsConfig(psnr_below=20), "runs/a", lambda step, text: notes.append((step, text)))
    for step, psnr in enumerate((25.0, float("nan"), float("nan"), float("inf"), 19.0), 1):
        alerts.validated(step, {"val/psnr": psnr})
    alerts.close()
    assert [step for step, _ in notes] == [2, 5]
    assert notes[0][1] == "    runs/a, step 2: validation PSNR is not a number, with alerts.psnr_below = 20"


def test_a_stall_speaks_once_until_the_next_step() -> None:
    notes: Queue[tuple[int, str]] = Queue()
    alerts = Alerts(AlertsConfig(stalled_seconds=0.05), "runs/a", lambda step, text: notes.put((step, text)))
    step, text = notes.get(timeout=60)
    assert (step, "no step for 0 s (alerts.stalled_seconds = 0.05)" in text) == (0, True)
    alerts.step(7)
    step, _ = notes.get(timeout=60)
    alerts.close()
    assert step == 7
    assert notes.empty()


def test_a_webhook_gets_the_alert_and_no_log_its_address(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "address").write_text(f"{hook.address}\n")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "address"))
    run = RunFolder(str(tmp_path / "run"), 1e9)
    with run:
        world = World(0, 1, torch.device("cpu"))
        logs = RunLogs(run, world, TrainConfig(), 1, AlertsConfig(psnr_below=30))
        logs.validation(4, dict.fromkeys(VAL_TAGS, 20.0), torch.full((1, len(VAL_TAGS)), 20.0))
        hook.status = 500
        logs.alert(5, "loss is not finite")
        logs.close()
    told = dict([hook.sent.get(timeout=60), hook.sent.get(timeout=60)][0:1])
    assert told[SECRET]["run"] == str(tmp_path / "run")
    assert "status 500" in caplog.text
    assert caplog.text.count("alert: ") == 2
    assert "hush" not in caplog.text
    events = Feed(open_storage(str(tmp_path / "run/events/aggregate"))).events()
    texts = [value.tensor.string_val[0] for event in events for value in event.summary.value if value.tag == "alerts"]
    assert len(texts) == 2
    assert b"below alerts.psnr_below = 30" in texts[0]


def test_an_unreachable_webhook_is_named_by_its_error_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Bound and never listening: the connection is refused, and no other process can take the port meanwhile.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv(URL_VARIABLE, f"http://127.0.0.1:{taken.getsockname()[1]}/hush")
        alerts = Alerts(AlertsConfig(), "runs/a", lambda step, text: None)
        alerts.send(1, "x")
        alerts.close()
    assert "could not be reached (NewConnectionError)" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("value", ["ftp://h/hush", "hush", "http://h/hush\nx"])
def test_an_address_that_is_none_is_a_warning_without_it(value: str, caplog: pytest.LogCaptureFixture) -> None:
    assert webhook_address({URL_VARIABLE: value}) is None
    assert f"{URL_VARIABLE} holds no http:// or https:// address" in caplog.text
    assert "hush" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert webhook_address({FILE_VARIABLE: "/dev/null"}) is None


def test_a_loss_that_is_not_finite_ends_in_an_alert(world: World, make_config: object, tmp_path: Path) -> None:
    assert callable(make_config)
    config: RunConfig = make_config(tmp_path / "run", "train.learning_rate=1e30", "train.max_steps=8")
    with pytest.raises(NonFiniteLossError):
        run_training(config)
    events = Feed(open_storage(str(tmp_path / "run/events/aggregate"))).events()
    texts = [value.tensor.string_val[0] for event in events for value in event.summary.value if value.tag == "alerts"]
    assert len(texts) == 1
    assert b"not finite" in texts[0]


def test_rules_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"alerts\.stalled_seconds"):
        AlertsConfig(stalled_seconds=-1)
