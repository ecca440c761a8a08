"""The demo: however it ends, nothing but the output folder remains."""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.local import demo, objectstore
from cluster.local.processes import identify, running_with, stop
from pipeline.evaluation.baselines import BASELINES
from pipeline.evaluation.result import COLUMNS, FUSED, Evaluation
from sharding.sources.synthetic.rasters import write_worldstrat
from tests.listening import is_loopback, listening

TOKEN = "SATFUSION_TEST_DEMO"


@dataclass
class Demo:
    """A running ``satfusion demo``, and a way to find every process that it starts."""

    process: subprocess.Popen[str]
    token: str
    temporary: Path
    errors: Path
    seen: list[str] = field(default_factory=list)

    def wait_for(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(line)
            if words in line:
                return
        pytest.fail(f"ended before {words!r}: {''.join(self.seen)}{self.errors.read_text()}")

    def listening(self) -> set[tuple[str, int]]:
        return listening([process.pid for process in running_with(TOKEN, self.token)])

    def end(self) -> int:
        """Wait for its end and return its status; every process that it started must have ended."""
        rest, _ = self.process.communicate(timeout=400)
        self.seen.append(rest)
        assert running_with(TOKEN, self.token) == []
        assert [path.name for path in self.temporary.glob("sf-demo-*")] == []
        return self.process.returncode


@contextlib.contextmanager
def started(output: Path, *arguments: str) -> Iterator[Demo]:
    token = secrets.token_hex(8)
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="sf-") as temporary, (output.parent / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "demo", "--output", str(output), *arguments],
            env={**os.environ, TOKEN: token, "TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Demo(process, token, Path(temporary), Path(errors.name))
        finally:
            process.kill()
            process.communicate()
            stop(running_with(TOKEN, token))


@pytest.fixture(scope="module")
def worldstrat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worldstrat")
    write_worldstrat(folder, aois=3, seed=1, hr_side=264)
    return folder


@pytest.mark.distributed
def test_ctrl_c_with_the_s3_server_up_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path / "out") as demo:
        demo.wait_for("S3 server ready")
        assert (tmp_path / "out/s3/s3.json").exists()
        sockets = demo.listening()
        assert len(sockets) >= 8
        assert all(is_loopback(address) for address, _ in sockets)
        demo.process.send_signal(signal.SIGINT)
        assert demo.end() == 130
        assert demo.errors.read_text().endswith("satfusion: interrupted\n")
    assert not (tmp_path / "out/s3").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_with_the_nodes_up_leaves_nothing_even_when_repeated(
    number: signal.Signals, tmp_path: Path, worldstrat: Path
) -> None:
    with started(tmp_path / "out", "--worldstrat", str(worldstrat)) as demo:
        demo.wait_for("training on")
        assert len(demo.listening()) > 15
        demo.process.send_signal(number)
        for impatient in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            time.sleep(0.3)
            demo.process.send_signal(impatient)
        assert demo.end() == 130
        assert "Traceback" not in demo.errors.read_text()
    assert not (tmp_path / "out/s3").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_whole_demo_that_learned_nothing_says_so_in_its_status(tmp_path: Path, worldstrat: Path) -> None:
    arguments = ("--worldstrat", str(worldstrat), "train.max_steps=2", "train.warmup_steps=1")
    with started(tmp_path / "out", *arguments) as demo:
        assert demo.end() == 1, demo.errors.read_text()
    printed = "".join(demo.seen)
    assert "rank 1 of 2 runs on node" in printed
    assert "NOT above" in printed
    assert list((tmp_path / "out/run/evaluation").glob("*/chips.csv"))
    assert not (tmp_path / "out/s3").exists()


def test_a_server_that_does_not_start_leaves_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = tmp_path / "weed"
    failing.write_text("#!/bin/sh\necho no room left on the disk; exit 7\n")
    failing.chmod(0o755)
    monkeypatch.setattr(objectstore, "_find_weed", lambda: str(failing))
    assert failed_demo(tmp_path, monkeypatch) == 2
    assert "no room left on the disk" in capsys.readouterr().err


def test_data_that_cannot_be_used_leaves_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert failed_demo(tmp_path, monkeypatch, "--worldstrat", str(tmp_path / "empty")) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err


def failed_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a demo that fails before its nodes start; its S3 and state folders must be gone, and signals restored."""
    (folder / "tmp").mkdir()
    multiprocessing.util.get_temp_dir()  # created once per process, and kept to its end
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    status = main(["demo", "--output", str(folder / "out"), *arguments])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert os.environ.get("AWS_ENDPOINT_URL") == endpoint
    assert not (folder / "out/s3").exists()
    assert list((folder / "tmp").iterdir()) == []
    return status


def test_an_output_that_is_no_folder_of_a_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for output in ("", "file", "file/below"):
        assert main(["demo", "--output", str(tmp_path / output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"satfusion: error: --output {tmp_path / output} ")
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def mark(folder: Path, pid: int, since: int, state: Path) -> None:
    (folder / ".satfusion-demo").write_text(f"{pid}\n{since}\n{state}")


def test_a_demo_that_runs_keeps_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = identify(os.getpid())
    assert own is not None
    mark(tmp_path, own.pid, own.started, tmp_path / "sf-demo-state")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert f"is in use by a demo that runs (process {own.pid})" in capsys.readouterr().err
    assert (tmp_path / ".satfusion-demo").exists()
    assert main(["demo", "--output", str(tmp_path / "other"), "output.uri=runs/mine"]) == 2
    assert "remove 'output.uri=runs/mine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1\n2",
        "-1\n5\n/tmp/sf-demo-x",
        "1\n5\n/home/ada/state",
        "1\n5\nsf-demo-x",
        "9" * 5000 + "\n5\n/sf-demo-x",
    ],
)
def test_a_mark_that_no_demo_wrote_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".satfusion-demo").write_text(text)
    (tmp_path / "run").mkdir()
    assert main(["demo", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/.satfusion-demo is not the mark of a demo: move the folder away" in error
    assert error.count("\n") == 1
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["notes.txt", "run/notes.txt", "worldstrat/notes.txt"])
def test_a_file_of_the_users_keeps_the_output_of_an_earlier_demo(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(tmp_path, 2**31 - 1, 5, tmp_path / "sf-demo-state")
    for folder in ("run/images", "worldstrat/hr_dataset", "s3"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path}/{name} is not from a demo: nothing was changed; move it away" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "run/images").exists()


def test_a_killed_demos_output_and_state_are_removed(tmp_path: Path) -> None:
    output, state = tmp_path / "out", tmp_path / "sf-demo-1"
    output.mkdir()
    state.mkdir()
    mark(output, 2**31 - 1, 5, state)
    for file in ("run/images/a.png", "run/config.json", "run/.tmp-1", "worldstrat/hr_dataset/a/b.tiff", "s3/s3.json"):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        (output / file).write_text("old")
    demo._remove_last(output)
    assert list(output.iterdir()) == []
    assert not state.exists()


def evaluation(raw: Sequence[float], adjusted: Sequence[float]) -> Evaluation:
    methods = (FUSED, *BASELINES)
    rows: list[dict[str, object]] = [
        {
            "aoi": "a",
            "chip": 0,
            "method": method,
            **dict.fromkeys(COLUMNS, 0.0),
            "agreement": None,
            "psnr": psnr,
            "psnr_adjusted": shifted,
        }
        for method, psnr, shifted in zip(methods, raw, adjusted, strict=True)
    ]
    return Evaluation("best-2", "test", "off", "centred", rows, methods, "s3://satfusion/run/evaluation/test-best-2")


@pytest.mark.parametrize(
    ("raw", "adjusted", "above"),
    [
        ((30, 20, 25), (32, 31, 30), True),
        ((30, 20, 25), (31, 32, 30), False),
        ((22, 20, 25), (33, 32, 30), False),
        ((25, 25, 25), (33, 32, 30), False),
    ],
)
def test_the_demo_fails_unless_it_beats_both_baselines_raw_and_adjusted(
    raw: Sequence[float], adjusted: Sequence[float], above: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo._report(evaluation(raw, adjusted), tmp_path, 60.0) is above
    printed = capsys.readouterr().out
    assert ("NOT above" not in printed) is above
    assert str(tmp_path / "run/evaluation/test-best-2") in printed
