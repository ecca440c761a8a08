"""Starts and state folders of a local cluster that are refused, fail, or find what others left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.local.processes import ProcessId, identify, is_running, running_with
from sharding.errors import UserError
from tests.cluster.local.conftest import MARK
from tests.strangers import NOBODY

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"mark": 5}', "\0"])
def test_a_state_that_is_none_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_text(text)
    for action in ("status", "down", "up"):
        assert main(["cluster", action, "--state", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}/state.json is not the state of a cluster (" in error
        assert error.count("\n") == 1


def test_a_failed_up_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[LocalCluster] = []

    def fail(cluster: LocalCluster) -> None:
        started.append(cluster)
        assert running_with(MARK, cluster.mark)
        raise UserError("the dashboard does not answer")

    monkeypatch.setattr(local, "_wait_for_nodes", fail)
    with pytest.raises(UserError, match="does not answer"):
        local.up(NodeOptions(nodes=1), folder / "c")
    assert running_with(MARK, started[0].mark) == []
    assert not (folder / "c").exists()


def test_a_node_that_does_not_start_says_why(folder: Path) -> None:
    # Ray refuses a store larger than the machine.
    with pytest.raises(UserError, match=r"127\.0\.0\.2 did not start") as caught:
        local.up(NodeOptions(nodes=1, object_store_mb=10**7), folder / "c")
    assert len(str(caught.value)) < 1500
    assert not (folder / "c").exists()


@pytest.mark.parametrize(
    "options", [{"nodes": 0}, {"nodes": 999}, {"cpus_per_node": 0}, {"gpus_per_node": -1}, {"object_store_mb": 10}]
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')} .* is out of range"):
        NodeOptions(**options)


def test_files_of_others_in_a_state_folder_stay(folder: Path) -> None:
    (folder / "logs").mkdir(mode=0o700)
    (folder / "logs" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'logs', which no cluster of this program is known to have made"):
        local.up(NodeOptions(nodes=1), folder)
    assert [path.name for path in folder.rglob("*")] == ["logs", "mine.txt"]


def test_a_state_folder_that_cannot_serve_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        local.up(NodeOptions(), folder / ("long" * 20))
    with pytest.raises(UserError, match="space"):
        local.up(NodeOptions(), folder / "a b")
    assert list(folder.iterdir()) == []
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match="remove it"):
        local.down(folder)


def test_a_state_folder_that_another_user_could_write_to_is_refused(folder: Path) -> None:
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    with pytest.raises(UserError, match=r"other users may write to the state folder .* run `chmod go-w"):
        local.up(NodeOptions(), folder / "open")
    assert list((folder / "open").iterdir()) == []
    if os.getuid() == 0:
        (folder / "theirs").mkdir()
        os.chown(folder / "theirs", NOBODY, NOBODY)
        for use in (lambda: local.up(NodeOptions(), folder / "theirs"), lambda: local.down(folder / "theirs")):
            with pytest.raises(UserError, match="belongs to another user"):
                use()


def test_a_reused_process_number_is_not_ours() -> None:
    own = identify(os.getpid())
    assert own is not None
    assert is_running(own)
    assert not is_running(ProcessId(own.pid, own.started - 1))


def test_leftovers_of_a_reboot_do_not_stand_in_the_way(tmp_path: Path) -> None:
    gone = LocalCluster("mark", "http://127.0.0.1:9", "127.0.0.2:9", ("127.0.0.2",), 1, 0, (ProcessId(1, -1),))
    local._write_state(tmp_path, gone)
    assert local.read_state(tmp_path) == gone
    assert local.down(tmp_path) == gone
    assert local.read_state(tmp_path) is None
