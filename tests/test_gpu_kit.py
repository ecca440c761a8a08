"""The GPU kit without a GPU: the tests marked gpu skip, the command runs its parts to the end, wheels are complete."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu, gpu_kit
from benchmarks.build_mamba import for_one_gpu
from benchmarks.gpu_parts import largest_batch
from benchmarks.results import table
from tests.gpu.conftest import REASON
from tests.test_dependencies import direct_dependencies

ROOT = Path(__file__).parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"

WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import pytest
sys.exit(pytest.main(["-m", "gpu", "-rs", "-p", "no:cacheprovider"]))
"""


def blocked() -> set[str]:
    """Return the modules of this project's direct dependencies that neither the kit nor the GPU machine has."""
    there, found = {*gpu_kit.WHEELS, *gpu_kit.THERE, gpu_kit.DEEPSPEED, "mamba-ssm"}, set[str]()
    while there:
        name = canonicalize_name(there.pop())
        if name not in found:
            found.add(name)
            with suppress(metadata.PackageNotFoundError):
                needs = map(Requirement, metadata.requires(name) or ())
                there |= {need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})}
    missing = {canonicalize_name(name) for name in direct_dependencies()} - found
    modules = metadata.packages_distributions()
    return {module for module, owners in modules.items() if missing & {canonicalize_name(name) for name in owners}}


def test_gpu_tests_skip_for_one_reason_where_nothing_but_the_kit_is() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("SATFUSION_GPU_TESTS_ON", None)
    script = WITHOUT.replace("{BLOCKED}", repr(blocked()))
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    reasons = re.findall(r"^SKIPPED \[(\d+)\] .*?: (.*)", ended.stdout, re.M)
    assert {reason for _, reason in reasons} == {REASON}, ended.stdout
    # 17 golden cases in two precisions, 41 models, 4 ZeRO stages, 4 checkpoints, 1 step, 2 loaders, 4 scans.
    assert sum(int(number) for number, _ in reasons) >= 2 * 17 + 41 + 4 + 4 + 1 + 2 + 4


def test_all_gpu_tests_are_in_their_folder() -> None:
    marker = re.compile(r"mark\.gpu\b")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path != Path(__file__):
            assert bool(marker.search(path.read_text(encoding="utf-8"))) == (GPU_TESTS in path.parents), path


@pytest.mark.slow
def test_the_command_runs_on_a_cpu(small_uri: str, tmp_path: Path) -> None:
    """The way that it goes on a GPU machine: a wheel installed, every part run, the results of each kept."""
    kit, output = tmp_path / "kit", tmp_path / "output"
    make_wheel(kit / "wheels", "kitprobe", [])
    (kit / "kit.json").write_text(json.dumps({"python": ".".join(platform.python_version_tuple()[:2])}))
    (kit / "small").symlink_to(small_uri)
    arguments = ["--kit", str(kit), "--output", str(output), "--device", "cpu", "--quick"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    ends = {line["part"]: line for line in lines if "took" in line}
    assert "Traceback" not in ended.stderr, ended.stderr
    assert {name: end.get("traceback") for name, end in ends.items() if name in EXPECTED_TO_PASS} == dict.fromkeys(
        EXPECTED_TO_PASS
    )
    assert ends.keys() == {*EXPECTED_TO_PASS, "step bf16", "step fp32", "largest batch", "compile"}
    assert ended.returncode == int(any(end["outcome"] != "passed" for end in ends.values()))
    assert {"installed": 1, "with": "pip"}.items() <= lines[0].items()
    outcomes = [line["outcome"] for line in lines if "test" in line]
    assert set(outcomes) == {"passed", "skipped"}
    assert outcomes.count("passed") >= 8
    text = (output / "table.txt").read_text()
    assert text in ended.stdout
    assert "tests/gpu/test_golden.py::test_float32[None+PNN]" in text
    files = sorted(path.name for path in output.iterdir())
    assert len(files) <= 8
    assert all(name in ("results.jsonl", "table.txt", "log.txt") or name.endswith(".gz") for name in files)


EXPECTED_TO_PASS = ("kit", "environment", "tests", "cpu op", "loader", "profile")


def make_wheel(folder: Path, name: str, requires: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def setting(tmp_path: Path) -> gpu.Setting:
    return gpu.Setting(tmp_path, tmp_path, "cpu", quick=True, environment={**os.environ, "PYTHONPATH": str(tmp_path)})


def run(setting: gpu.Setting, module: str, seconds: float = 400) -> list[Mapping[str, object]]:
    """Run a module as a part and return its lines."""
    (setting.output / "part_under_test.py").write_text(module)
    results = gpu.Results(setting.output)
    gpu.run_part(gpu.Part("probe", 0, "part_under_test", ["{device}", "{json}"]), setting, seconds, results)
    results.close()
    return [json.loads(line) for line in (setting.output / "results.jsonl").read_text().splitlines()]


def test_a_part_that_fails_keeps_its_results_and_its_traceback(setting: gpu.Setting) -> None:
    emitted = "import sys; from benchmarks.results import emit; emit(device=sys.argv[1]); 1 / 0"
    result, end = run(setting, emitted)
    assert result["device"] == "cpu"
    assert end["outcome"] == "failed"
    assert str(end["traceback"]).endswith("ZeroDivisionError: division by zero\n")
    assert "ZeroDivisionError" in (setting.output / "log.txt").read_text()
    assert "ZeroDivisionError: division by zero" in table([result, end])


def test_a_part_past_its_time_is_ended_with_what_it_started(setting: gpu.Setting) -> None:
    module = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "a").write('{"child": %d}\\n{"half' % child.pid)
time.sleep(600)
"""
    for seconds in (2, 20, 100):  # a busy machine may not have started it by then
        *results, end = run(setting, module, seconds)
        assert end["outcome"] == "timed out"
        if started := [result["child"] for result in results if "child" in result]:
            break
    stat = Path(f"/proc/{started[-1]}/stat")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until whoever adopts it has taken its status
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("its child still runs")


def test_time_is_kept_for_later_parts(setting: gpu.Setting) -> None:
    parts = gpu.parts(setting)
    assert sum(part.seconds for part in parts) <= gpu.SECONDS
    assert gpu.allowed_seconds(gpu.SECONDS, parts[1:]) >= parts[0].seconds
    assert gpu.allowed_seconds(10.0, parts[1:]) == 0
    assert gpu.allowed_seconds(10.0, []) == 10


def test_a_kit_of_another_python_is_not_installed(tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "kitprobe", [])
    (tmp_path / "kit.json").write_text('{"python": "2.7"}')
    assert gpu.install(tmp_path, tmp_path / "target")["installed"] == 0
    assert not (tmp_path / "target").exists()


def test_without_pip_the_kit_is_unzipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", "kitprobe", [])
    (tmp_path / "kit.json").write_text(json.dumps({"python": ".".join(platform.python_version_tuple()[:2])}))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    said = gpu.install(tmp_path, tmp_path / "target")
    assert said["installed"] == 1
    assert str(said["with"]).startswith("zipfile")
    assert (tmp_path / "target" / "kitprobe.py").exists()


def test_a_wheel_that_needs_more_than_the_kit_is_named(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "kitprobe", ["numpy>=2", "absent", "old; python_version < '3.12'", "x; extra == 'x'"])
    assert gpu_kit.missing([wheel]) == {"absent": wheel.name}


def test_every_wheel_of_the_kit_is_pinned() -> None:
    assert {gpu_kit.canonicalize_name(name) for name in (*gpu_kit.WHEELS, gpu_kit.DEEPSPEED)} <= gpu_kit.pins().keys()


def test_the_largest_batch_is_the_last_that_fits() -> None:
    assert largest_batch(lambda size: size <= 100) == 64
    assert largest_batch(lambda size: False) == 0
    assert largest_batch(lambda size: True, most=32) == 32


SETUP = """
def threads(args):
    return args + ["--threads", "4"]
if True:
        cc_flag.append("-gencode")
        cc_flag.append("arch=compute_80,code=sm_80")
        if bare_metal_version >= Version("11.8"):
            cc_flag.append("-gencode")
            cc_flag.append("arch=compute_90,code=sm_90")
        if bare_metal_version >= Version("12.8"):
            cc_flag.append("-gencode")
            cc_flag.append("arch=compute_100,code=sm_100")
flags = ["-O3", "-lineinfo"]
"""


def test_mamba_is_built_for_one_gpu() -> None:
    changed = for_one_gpu(SETUP)
    compile(changed, "setup.py", "exec")
    assert re.findall(r"code=sm_(\d+)", changed) == ["90"]
    assert '"--threads", "1"' in changed
    assert "lineinfo" not in changed
    assert "--compress-mode=size" in changed
    with pytest.raises(ValueError, match="is not the one"):
        for_one_gpu("setup()")
