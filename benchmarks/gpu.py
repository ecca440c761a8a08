"""All GPU checks in one command, without network: ``python3 -m benchmarks.gpu --kit gpu-kit --output DIR``.

It needs Python, PyTorch and the kit that ``make gpu-kit`` gathers. It runs its parts in order of importance, each in a
process of its own, and takes eight minutes at most. DIR then holds ``results.jsonl``, one line for each result as soon
as it is known, ``table.txt``, ``log.txt`` with the output of the parts, and gzipped traces. A part that fails or times
out leaves its traceback there, and the next part runs. ``--device cpu --quick`` takes the same path on any machine, in
less than two minutes once DeepSpeed's CPU op is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.results import VARIABLE, table

ROOT = Path(__file__).parents[1]
SECONDS = 480
"""Seconds for all parts."""
MODELS = (
    *("srcnn+pnn", "highresnet+pannet", "rams+pannet", "trnet+pannet"),
    *("trnet_pan+pnn", "trnet+innformer", "srcnn+arconv", "none+u2net"),
)
QUICK_MODELS = ("none+pnn",)
QUICK_TESTS = " or ".join(
    (
        *("test_float32[None+PNN]", "test_bfloat16[None+PNN]", "test_bfloat16[none-pnn]", "test_bfloat16[srcnn-pnn]"),
        *("test_mamba_ssm_equals_ours[1-1]", "test_loader", "waits_for_nothing", "test_twenty_steps_at_zero_stage[0]"),
    )
)
"""A test of each kind that takes seconds on a CPU."""
CPU_OP_SECONDS = 240

LOG_BYTES = 4 << 20
TRACEBACK_CHARACTERS = 8000


@dataclass(frozen=True)
class Setting:
    """Settings shared by the parts."""

    kit: Path
    """Folder of the kit."""
    output: Path
    """Folder of the results."""
    device: str
    """``cuda`` or ``cpu``."""
    quick: bool
    """Whether each part does its minimum."""
    environment: Mapping[str, str]
    """Environment variables of the processes."""

    @property
    def data(self) -> str:
        """Return the URI of one of the kit's datasets."""
        return str(self.kit / ("small" if self.quick else "dataset"))


@dataclass(frozen=True)
class Part:
    """One part: a process, and the time reserved for it whatever comes before."""

    name: str
    """Name in the results."""
    seconds: float
    """Reserved seconds; time left over by earlier parts is added."""
    module: str
    """Module that ``python -m`` runs."""
    arguments: Sequence[str]
    """Arguments; ``{device}``, ``{data}``, ``{output}`` and ``{json}``, a file for lines of JSON, are filled in."""


def parts(setting: Setting) -> list[Part]:
    """Return the parts, most important first; their seconds sum to SECONDS at most."""
    quick = ["--quick"] if setting.quick else []
    models = QUICK_MODELS if setting.quick else MODELS
    tests = ["-m", "gpu", "-p", "benchmarks.gpu_outcomes", "-p", "no:cacheprovider", "--tb", "short", "tests/gpu"]
    tests += ["-k", QUICK_TESTS] if setting.quick else []
    if setting.environment.get("PYTEST_TIMEOUT"):
        tests += ["-p", "pytest_timeout"]

    def step(precision: str) -> list[str]:
        common = ["--device", "{device}", "--precision", precision, "--models", *models, "--batch", "8"]
        return [*common, "--json", "{json}", "--data", "{data}", *quick]

    own = ["--device", "{device}", "--data", "{data}", "--output", "{output}", *quick]
    return [
        Part("environment", 20, "benchmarks.gpu_parts", ["environment", *own]),
        Part("tests", 200, "pytest", tests),
        Part("step bf16", 60, "benchmarks.step", step("bf16")),
        Part("step fp32", 40, "benchmarks.step", step("fp32")),
        Part("largest batch", 30, "benchmarks.gpu_parts", ["largest", *own, "--models", *models]),
        Part("compile", 60, "benchmarks.gpu_parts", ["compile", *own]),
        Part("loader", 30, "benchmarks.gpu_parts", ["loader", *own]),
        Part("profile", 30, "benchmarks.gpu_parts", ["profile", *own]),
    ]


def allowed_seconds(left: float, later: Sequence[Part]) -> float:
    """Return the seconds that a part may take: all that is left except the seconds reserved for later parts."""
    return max(0.0, left - sum(part.seconds for part in later))


class Results:
    """The file ``results.jsonl``."""

    def __init__(self, output: Path) -> None:
        """Create an empty file."""
        self.lines: list[dict[str, object]] = []
        self._began = time.monotonic()
        self._adding = threading.Lock()
        self._file = (output / "results.jsonl").open("w", encoding="utf-8", buffering=1)

    def add(self, part: str, fields: Mapping[str, object]) -> None:
        """Write a line at once."""
        line = {"part": part, "at": round(time.monotonic() - self._began, 1), **fields}
        with self._adding:
            self.lines.append(line)
            self._file.write(json.dumps(line) + "\n")
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Follower:
    """Reader of the lines of JSON that a process appends to a file while it runs."""

    def __init__(self, path: Path, part: str, results: Results) -> None:
        """Follow ``path``, which need not exist yet."""
        self._path, self._part, self._results = path, part, results
        self._taken = 0

    def take(self) -> None:
        """Read the complete new lines into the results."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._taken)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._taken += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                self._results.add(self._part, value if isinstance(value, dict) else {"value": value})


def run_part(part: Part, setting: Setting, seconds: float, results: Results) -> str:
    """Run one part and write its outcome; return ``passed``, ``failed`` or ``timed out``."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, (Path(temporary) / "said").open("w+b") as said:
        lines = Path(temporary) / "lines"
        known = {"device": setting.device, "data": setting.data, "output": str(setting.output), "json": str(lines)}
        arguments = [known.get(a[1:-1], a) if a.startswith("{") else a for a in part.arguments]
        follower = Follower(lines, part.name, results)
        process = subprocess.Popen(
            [sys.executable, "-m", part.module, *arguments],
            cwd=ROOT,
            env={**setting.environment, VARIABLE: str(lines)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            in_time = _wait(process, began + seconds, follower)
        finally:
            _end(process)
            follower.take()
        said.seek(0)
        text = said.read().decode(errors="replace")
    outcome = "timed out" if not in_time else "failed" if process.returncode else "passed"
    _append_log(setting.output / "log.txt", part.name, text)
    end: dict[str, object] = {"outcome": outcome, "took": round(time.monotonic() - began, 1)}
    if outcome != "passed":
        end["traceback"] = text[-TRACEBACK_CHARACTERS:]
    results.add(part.name, end)
    return outcome


@contextlib.contextmanager
def cpu_op_beside(setting: Setting, results: Results) -> Iterator[None]:
    """Compile DeepSpeed's CPU op beside the parts, in about a minute: parts that compute on the CPU wait for it."""
    on_cpu = replace(setting, environment={**setting.environment, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    part = Part("cpu op", 0, "pipeline.engines.build_op", [])
    thread = threading.Thread(target=run_part, args=(part, on_cpu, CPU_OP_SECONDS, results))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def run_all(setting: Setting, until: float, results: Results) -> bool:
    """Run all parts until the time ``until``; return whether all passed."""
    planned = parts(setting)
    outcomes = []
    with cpu_op_beside(setting, results):
        for number, part in enumerate(planned):
            print(f"{part.name} ...", flush=True)
            seconds = allowed_seconds(until - time.monotonic(), planned[number + 1 :])
            outcomes.append(run_part(part, setting, seconds, results))
            print(f"{part.name} {outcomes[-1]}", flush=True)
    return set(outcomes) == {"passed"}


def _wait(process: subprocess.Popen[bytes], until: float, follower: Follower) -> bool:
    """Wait for the end of a process and read its lines; return whether it ended in time."""
    while process.poll() is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
        follower.take()
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its remaining child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _append_log(path: Path, part: str, text: str) -> None:
    with path.open("a", encoding="utf-8") as log:
        if log.tell() < LOG_BYTES:
            log.write(f"==== {part}\n{text[-LOG_BYTES // 4 :]}\n")


def install(kit: Path, target: Path) -> dict[str, object]:
    """Install the kit's wheels into ``target``, if they are for this Python; return a result that reports it."""
    wheels = sorted((kit / "wheels").glob("*.whl"))
    wanted = json.loads((kit / "kit.json").read_text(encoding="utf-8"))["python"]
    here = ".".join(platform.python_version_tuple()[:2])
    if wanted != here:
        return {
            "installed": 0,
            "why": f"the kit is for Python {wanted} and this is {here}: the packages installed here are used",
        }
    options = ("--no-index", "--no-deps", "--no-compile", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return {"installed": len(wheels), "with": "pip"}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    said = (done.stdout + done.stderr).strip().splitlines()
    return {"installed": len(wheels), "with": f"zipfile, since pip failed: {said[-1] if said else done.returncode}"}


def environment(kit: Path, target: Path, device: str) -> dict[str, str]:
    """Return the environment of the parts: the kit's packages before this Python's own."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "SATFUSION_KIT": str(kit),
        # Plugins of other projects' tests take seconds, and may need packages that are absent here.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    if device == "cpu":
        own |= {"SATFUSION_GPU_TESTS_ON": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if (target / "pytest_timeout.py").exists() or importlib.util.find_spec("pytest_timeout"):
        own["PYTEST_TIMEOUT"] = "120"
    return {**os.environ, **own}


@contextlib.contextmanager
def installed(options: argparse.Namespace, results: Results) -> Iterator[Setting]:
    """Yield the setting, with the kit's wheels in a folder that is removed afterwards."""
    kit, output = options.kit.resolve(), options.output.resolve()
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as target:
        began = time.monotonic()
        try:
            results.add("kit", install(kit, Path(target)))
            end: dict[str, object] = {"outcome": "passed"}
        except Exception as error:
            # The parts run all the same: the machine may have the packages.
            end = {"outcome": "failed", "traceback": str(error)}
        results.add("kit", {**end, "took": round(time.monotonic() - began, 1)})
        variables = environment(kit, Path(target), options.device)
        yield Setting(kit, output, options.device, options.quick, variables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, help="folder made by `make gpu-kit`")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the results; those of an earlier run are overwritten"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the minimum of each part, to check that the parts run")
    options = parser.parse_args(arguments)
    if not (options.kit / "kit.json").is_file():
        sys.exit(f"{options.kit} is not a kit: make it with `make gpu-kit` on a machine with a network")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "log.txt").write_text("")
    until = time.monotonic() + SECONDS
    results = Results(options.output)
    with installed(options, results) as setting:
        passed = run_all(setting, until, results)
    results.close()
    text = table(results.lines)
    (options.output / "table.txt").write_text(text, encoding="utf-8")
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
