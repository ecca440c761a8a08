"""CPU time of a chip by its causes: of our loader reading files, of the floors, and of LitData.

``python -m benchmarks.loader_costs --folder DIR``; ``DIR`` is made as by ``benchmarks.loader``. Each form runs in a
process of its own, and the forms take turns. Times are of the CPU, user and system, because those hardly depend on
other work on the machine: of the process, and, for the parts, of the thread that runs them. The clock starts after one
epoch. Files are in the page cache throughout.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import loader_forms as forms
from benchmarks import peers
from benchmarks.loader import prepare
from benchmarks.loader_forms import Epoch, Place
from pipeline.order import Chips

PARTS = ("read", "CRC-32", "cut", "to batch", "variants", "order", "scene", "scenes", "batch", "plan", "library")
"""Scene, scenes, batch and plan are Python: of reading a sample, of the cache, of filling a batch, of prefetching."""
COUNTS = ("user", "system", "wall", "faults", "switches")
LEAST_SECONDS = 0.5
"""Least CPU time of a measurement."""


class Clock:
    """CPU time of functions, each without the functions inside it that are timed too."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = threading.local()
        self._lock = threading.Lock()

    def time(self, target: str, part: str) -> None:
        """Replace the function or method ``target`` for good by one whose time counts for ``part``."""
        module, _, name = target.rpartition(".")
        patch(target, self._timed(getattr(_resolve(module), name), part)).start()

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(self._inside, "seconds", 0.0)
            self._inside.seconds = 0.0
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - began
                with self._lock:
                    self.seconds[part] += spent - self._inside.seconds
                self._inside.seconds = outer + spent

        return timed


def _resolve(name: str) -> Any:
    """Return a module, or a class in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)


def in_storage_order(place: Place) -> Epoch:
    """Let our loader take chips as they are stored, with memory for the scenes at hand alone."""
    patch("pipeline.data.loader.epoch_batches", _stored_order).start()
    return forms.ours(place, evict=True, cache_mib=0)


def _stored_order(sizes: list[int], digest: str, seed: int, epoch: int, batch: int, *_: Any) -> Chips:
    return np.arange(forms.CHIPS_PER_SCENE * sum(sizes) // batch * batch).reshape(-1, batch)


def whole_scenes(place: Place) -> Epoch:
    """Keep samples whole, as random windows need it, and cut a chip when a batch takes it."""
    return forms.ours(place, evict=True, random_windows=True)


OURS = {
    "sharding.storage.local.LocalStorage.read_into": "read",
    "pipeline.data.sample_reader.check_sample": "CRC-32",
    "pipeline.data.chips.StoredChips.crop": "cut",
    "pipeline.data.scene_layout.CutScene.copy": "to batch",
    "pipeline.data.dataset.ChipDataset.variant": "variants",
    "pipeline.data.loader.TrainLoader.order": "order",
    "pipeline.data.loader.training_draws": "order",
    "pipeline.data.scene_layout.CutScenes.read": "scene",
    "pipeline.data.dataset.ChipDataset.crop": "batch",
    "pipeline.data.scene_cache.SceneCache.prefetch": "scenes",
    "pipeline.data.prefetch.Prefetcher.__init__": "plan",
    "pipeline.data.prefetch.Prefetcher.need": "plan",
    "pipeline.data.prefetch.Prefetcher.advance": "plan",
}
FLOOR = {
    "os.preadv": "read",
    "benchmarks.loader_forms.crc32": "CRC-32",
    "benchmarks.loader_forms.Gather.__call__": "to batch",
}
LITDATA = {
    "litdata.streaming.serializers.NumpySerializer.deserialize": "read",
    "litdata.StreamingDataset.__next__": "library",
    "benchmarks.loader_forms.Gather.__call__": "to batch",
}

Form = tuple[Callable[[Place], Epoch], dict[str, str]]
FORMS: dict[str, Form] = {
    "floor: read, copy": (partial(forms.floor, check=False), FLOOR),
    "floor: read, CRC-32, copy": (partial(forms.floor, check=True), FLOOR),
    "floor: map, copy": (forms.floor_mapped, FLOOR),
    "floor in order: read, copy": (partial(forms.floor_in_order, check=False), FLOOR),
    "floor in order: read, CRC-32, copy": (partial(forms.floor_in_order, check=True), FLOOR),
    "floor in order, huge pages: read, copy": (partial(forms.floor_in_order, check=False, huge=True), FLOOR),
    "ours, checks off": (forms.ours_unchecked, OURS),
    "ours": (partial(forms.ours, evict=True), OURS),
    "ours, whole scenes": (whole_scenes, OURS),
    "ours, storage order": (in_storage_order, OURS),
    "ours, scenes in memory": (forms.ours, OURS),
    "LitData": (partial(forms.peer, open_chips=partial(forms.litdata_chips, cold=False)), LITDATA),
}


def measure(place: Place, form: Form, *, parts: bool) -> dict[str, float]:
    """Return microseconds a chip by part, faults and context switches a chip; call it in a fresh process."""
    open_form, targets = form
    clock = Clock()
    if parts:
        for target, part in targets.items():
            clock.time(target, part)
    epoch = open_form(place)
    epoch(0, _ignore)
    clock.seconds.clear()
    before, wall, chips, number = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0, 0
    while chips == 0 or _cpu(resource.getrusage(resource.RUSAGE_SELF)) - _cpu(before) < LEAST_SECONDS:
        number += 1
        chips += epoch(number, _ignore)
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - wall
    seconds = {
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "wall": wall,
        **clock.seconds,
    }
    result = {name: 1e6 * value / chips for name, value in seconds.items()}
    return result | {
        "faults": (after.ru_minflt - before.ru_minflt) / chips,
        "switches": (after.ru_nvcsw - before.ru_nvcsw) / chips,
    }


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _ignore(_: forms.Images) -> None:
    pass


def run(name: str, cores: int, folder: Path, *, parts: bool) -> dict[str, float]:
    """Measure one form in a process of its own; it is forked, so that it need not import anything."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(run_here, (name, cores, folder, parts))


def run_here(name: str, cores: int, folder: Path, parts: bool) -> dict[str, float]:
    """Measure one form on its number of cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    return measure(Place(folder, folder, cores, 0), FORMS[name], parts=parts)


def report(results: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Print medians: microseconds a chip; the rest is the CPU time of no part."""
    columns = ("CPU", "least", *PARTS, "rest", *COUNTS)
    print(f"{'':40}{'cores':>6}" + "".join(f"{column:>10}" for column in columns))
    for (name, cores), runs in results.items():
        # Without the clocks of the parts for all that is of the process.
        plain, timed = runs[::2], runs[1::2]
        row = {column: statistics.median(run.get(column, 0.0) for run in timed) for column in PARTS}
        row |= {column: statistics.median(run[column] for run in plain) for column in COUNTS}
        cpu = [run["user"] + run["system"] for run in plain]
        row["rest"] = statistics.median(
            run["user"] + run["system"] - sum(run.get(part, 0.0) for part in PARTS) for run in timed
        )
        row |= {"CPU": statistics.median(cpu), "least": min(cpu)}
        print(f"{name:40}{cores:>6}" + "".join(f"{row[column]:>10.2f}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the samples, made and reused")
    parser.add_argument("--aois", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=[""], help="prefixes of the names of forms (default: all)")
    options = parser.parse_args()
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    peers.enable()
    prepare(options.folder, None, options.aois)
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    names = [name for name in FORMS if name.startswith(tuple(options.only))]
    for _ in range(options.rounds):
        for name in names:
            for cores in options.cores:
                for parts in (False, True):
                    results.setdefault((name, cores), []).append(run(name, cores, options.folder, parts=parts))
                    print(name, cores, parts, results[name, cores][-1], file=sys.stderr, flush=True)
    report(results)


if __name__ == "__main__":
    main()
