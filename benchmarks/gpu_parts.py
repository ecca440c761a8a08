"""Parts of `benchmarks.gpu`: ``python -m benchmarks.gpu_parts PART --device cuda --data URI --output DIR``.

They call the same functions as training, and write a line of JSON for each result.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import VARIABLE, emit

PACKAGES = ("deepspeed", "mamba_ssm", "numpy", "pydantic", "pytest", "tensorboard", "triton", "zlib-ng")
ACTIVITY = {"cuda": torch.profiler.ProfilerActivity.CUDA, "cpu": torch.profiler.ProfilerActivity.CPU}
TRACE_BYTES = 15 << 20
"""Size limit of traces; a larger trace is not kept."""


@dataclass(frozen=True)
class Options:
    """Options of a part."""

    device: str
    """``cuda`` or ``cpu``."""
    data: str
    """URI of a dataset."""
    output: Path
    """Folder of the files that are kept."""
    quick: bool
    """Whether to do the minimum."""
    models: tuple[str, ...]
    """Pairs as ``encoder+head``."""

    def overrides(self, pair: str, batch: int) -> list[str]:
        """Return the configuration of a training of a pair: the published width, or a tiny one to be quick."""
        from models.registry import parse_pair
        from sharding.format.index import Index
        from sharding.storage import open_storage

        encoder, head = parse_pair(pair)
        revisits = Index.load(open_storage(self.data)).preparation.revisits
        return [
            f"data.uri={self.data}",
            f"model.encoder={encoder}",
            f"model.head={head}",
            f"model.revisits={revisits}",
            f"model.hidden={8 if self.quick else 128}",
            f"train.global_batch={batch}",
            f"train.precision={'fp32' if self.device == 'cpu' else 'bf16'}",
            "train.checkpoint_every=1000000",
            "output.panels=0",
        ]


def environment(options: Options) -> None:
    """Write a result that describes the machine."""
    emit(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, cpus=os.cpu_count())
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            emit(package=package, version=importlib.metadata.version(package))
    if options.device == "cpu":
        return
    properties = torch.cuda.get_device_properties(0)
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        emit(driver=subprocess.run(driver, capture_output=True, text=True).stdout.strip())
    emit(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_mib=properties.total_memory >> 20,
        processors=properties.multi_processor_count,
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )


def largest(options: Options) -> None:
    """Find each pair's largest batch that fits, a power of two, and run the step benchmark with it."""
    for pair in options.models:
        batch = 2 if options.device == "cpu" else largest_batch(lambda size, pair=pair: _one_step(pair, size, "cuda"))
        emit(models=pair, largest_batch=batch)
        command = [sys.executable, "-m", "benchmarks.step", "--device", options.device, "--models", pair]
        command += ["--precision", "bf16", "--batch", str(batch), *(["--quick"] if options.quick else [])]
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines"
            done = subprocess.run(
                [*command, "--json", str(lines), "--data", options.data], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command[1:])}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            _pass_on(lines)


def _pass_on(lines: Path) -> None:
    """Append a file's lines to the results."""
    text = lines.read_text(encoding="utf-8")
    with Path(os.environ.get(VARIABLE, os.devnull)).open("a", encoding="utf-8") as file:
        file.write(text)


def largest_batch(fits: Callable[[int], bool], least: int = 8, most: int = 4096) -> int:
    """Return the largest ``least * 2**n`` up to ``most`` that fits, or 0 if even ``least`` does not."""
    batch = 0
    for size in itertools.takewhile(lambda size: size <= most, (least << n for n in itertools.count())):
        if not fits(size):
            break
        batch = size
    return batch


def _one_step(pair: str, batch: int, device: str) -> bool:
    """Return whether forward, loss and backward of a batch in bf16 fit, with weights, moments and gradients."""
    from models.config import ModelConfig
    from models.registry import build_model, parse_pair

    encoder, head = parse_pair(pair)
    config = ModelConfig(encoder, head)
    try:
        network = build_model(config).to(device).train()
        moments = [torch.zeros_like(p) for p in network.parameters() for _ in range(2)]
        lr = torch.rand(batch, config.revisits, config.bands, 50, 50, device=device)
        pan = torch.rand(batch, 1, 156, 156, device=device)
        with torch.autocast(device, torch.bfloat16):
            fused = network(lr, pan).fused
        fused.float().square().mean().backward()
        # Activations of the loss: some dozen images of the result's size.
        del moments, fused
        return torch.cuda.max_memory_allocated() < 0.9 * torch.cuda.get_device_properties(0).total_memory
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def trainer(options: Options, overrides: list[str]) -> Iterator[Any]:
    """Yield a trainer of one process, in a run folder that is removed afterwards."""
    from pipeline.config import load_config
    from pipeline.data import ChipDataset
    from pipeline.order import BatchPlan
    from pipeline.reporting.run_folder import RunFolder
    from pipeline.training.loop import Trainer
    from pipeline.world import join_world

    with tempfile.TemporaryDirectory() as folder:
        config = load_config("srcnn_pnn", [f"output.uri={folder}", *overrides])
        world = join_world()
        plan = BatchPlan.create(config.train.global_batch, config.train.micro_batch, world.size)
        dataset = ChipDataset(config.data.uri, "train", config.data)
        with RunFolder(config.output.uri, 0) as run:
            yield Trainer(config, world, plan, dataset, dataset.sibling("val"), run, None)


def timed_steps(options: Options, overrides: list[str], count: int) -> tuple[list[float], list[float]]:
    """Take steps; return the seconds of each, measured after the GPU has finished, and the losses."""
    seconds, losses = [], []
    with trainer(options, overrides) as one:
        while len(seconds) < count:
            for batch in itertools.islice(one.loader, count - len(seconds)):
                began = time.perf_counter()
                one.train_step(batch, 0)
                # Waits for the GPU.
                losses += [row.by_rank["train/loss"].mean().item() for row in one.values.arrived(everything=True)]
                seconds.append(time.perf_counter() - began)
    return seconds, losses


def compile_all(options: Options) -> None:
    """Train each pair for some steps as it is and compiled, and the pairs of the step benchmark first."""
    from models.registry import all_pairs

    pairs = list(dict.fromkeys([*options.models, *("+".join(pair) for pair in all_pairs())]))
    count = 3 if options.quick else 8
    for pair in pairs[:1] if options.quick else pairs:
        # ARConv is compiled after its kernels are frozen.
        common = [*options.overrides(pair, 2 if options.quick else 8), "model.kernel_freeze_step=1"]
        try:
            plain, expected = timed_steps(options, common, count)
            compiled, losses = timed_steps(options, [*common, "train.compile=true"], count)
        except Exception:
            emit(models=pair, outcome="failed", traceback=traceback.format_exc())
            continue
        emit(
            models=pair,
            outcome="passed",
            first_step_s=compiled[0],
            step_ms=1e3 * statistics.median(compiled[2:]),
            uncompiled_ms=1e3 * statistics.median(plain[2:]),
            loss_difference=max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
        )


def loader(options: Options) -> None:
    """Train with the loader beside it, and write the share of the time that steps wait for data."""
    from pipeline.config import load_config
    from pipeline.training.loop import run_training

    pair, batch, steps = ("none+pnn", 4, 6) if options.quick else ("srcnn+pnn", 8, 120)
    with tempfile.TemporaryDirectory() as folder:
        own = [f"output.uri={folder}/run", f"train.max_steps={steps}", f"train.epochs={steps}"]
        run_training(load_config("srcnn_pnn", [*options.overrides(pair, batch), *own, "data.random_windows=true"]))
        with (Path(folder) / "run" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))[2:]
    waits = [float(row["time/data_wait_seconds"]) for row in rows]
    seconds = [batch / float(row["time/chips_per_second"]) for row in rows]
    emit(
        models=pair,
        batch=batch,
        steps=len(rows),
        step_ms=1e3 * statistics.median(seconds),
        wait_ms=1e3 * statistics.median(waits),
        longest_wait_ms=1e3 * max(waits),
        wait_share=sum(waits) / sum(seconds),
    )


def profile(options: Options) -> None:
    """Write a trace of some steps, and the operations that took most of the device's time."""
    pair, batch, steps = ("none+pnn", 2, 2) if options.quick else ("srcnn+pnn", 8, 5)
    with trainer(options, options.overrides(pair, batch)) as one:
        batches = list(itertools.islice(one.loader, 2 + steps))
        for batch_of_chips in batches[:2]:
            one.train_step(batch_of_chips, 0)
        activities = {ACTIVITY["cpu"], ACTIVITY[options.device]}
        with torch.profiler.profile(activities=activities) as recorded:
            for batch_of_chips in batches[2:]:
                one.train_step(batch_of_chips, 0)
            if options.device == "cuda":
                torch.cuda.synchronize()
    trace = options.output / f"trace-{pair.replace('+', '-')}.json.gz"
    recorded.export_chrome_trace(str(trace))
    size = trace.stat().st_size
    if size > TRACE_BYTES:
        trace.unlink()
    emit(models=pair, batch=batch, steps=len(batches) - 2, trace=trace.name, bytes=size, kept=size <= TRACE_BYTES)
    column = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, column), reverse=True)
    total = sum(getattr(event, column) for event in events)
    for event in events[:12]:
        took = getattr(event, column)
        emit(name=event.key[:80], calls=event.count, ms_per_step=took / 1e3 / (len(batches) - 2), share=took / total)


PARTS = {
    "environment": environment,
    "largest": largest,
    "compile": compile_all,
    "loader": loader,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--data", required=True, help="URI of a dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder for files that are kept")
    parser.add_argument("--models", nargs="*", default=["srcnn+pnn"], help="pairs, encoder+head")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    told = Options(options.device, options.data, options.output, options.quick, tuple(options.models))
    PARTS[options.part](told)


if __name__ == "__main__":
    main()
