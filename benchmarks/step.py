"""Cost of a training step, phase by phase, beside a floor, a plain PyTorch engine and the published code.

``python -m benchmarks.step --models srcnn+pnn trnet+innformer --batch 8`` takes whole steps of each contender in turn
(A B A B ...) on random chips of WorldStrat's shape, and prints the median, the spread and the ratio to the first one,
pair by pair. Then each phase is timed alone, with the device idle in between. The floor is the time of the model's own
convolutions and matrix products, each alone (`benchmarks.floors`); FLOP/s count these only.

``--contenders`` names the compared steps: ``deepspeed`` and ``torch`` (our two engines), with options after colons, as
in ``deepspeed:zero2``, ``torch:channels_last``, ``torch:compile``, ``torch:tf32``. ``--published DIR`` adds the
published code from a folder of your own. ``--data URI`` also runs the real loop, with its loader, and reports its wait
for data. A contender that cannot be built or does not fit into memory becomes a row with the reason.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.contenders import PHASES, Contender, Ours, Published, model_config, random_batch
from benchmarks.floors import Floor, measure_floor
from pipeline.world import World, join_world

PAIRS = (
    "srcnn+pnn",
    "highresnet+pannet",
    "rams+pannet",
    "trnet+pannet",
    "trnet_pan+pnn",
    "trnet+innformer",
    "srcnn+arconv",
)
WARM_UP = 2
PUBLISHED_WIDTH, QUICK_WIDTH = 128, 8


@dataclass
class Row:
    """One contender's figures for one model."""

    model: str
    contender: str
    device: str
    precision: str
    batch: int
    threads: int
    error: str = ""
    """Reason if there are no results."""
    step_ms: float = 0.0
    """Median of whole steps."""
    step_ms_min: float = 0.0
    step_ms_max: float = 0.0
    ratio: float = 1.0
    """Median over pairs of this contender's step to the first contender's."""
    chips_per_second: float = 0.0
    phase_ms: dict[str, float] = field(default_factory=dict)
    """Medians of each phase, with the device idle before and after."""
    peak_mib: float = 0.0
    """Peak memory during a step: the allocator's on CUDA; on the CPU the growth of the process."""
    flops: float = 0.0
    """Operations of a step's convolutions, matrix products and attention."""
    flop_per_second: float = 0.0
    floor_ms: float = 0.0
    """Time of the same operations, each alone."""
    floor_share: float = 0.0
    """Floor / step; the rest up to 1 is all other work."""
    data_wait_share: float | None = None
    """With --data: waiting for data / time of all steps, in the real loop."""
    loop_chips_per_second: float | None = None


class Bench:
    """One model's contenders on one device."""

    def __init__(self, pair: str, options: argparse.Namespace, world: World) -> None:
        self.pair, self.options, self.world = pair, options, world
        self.rows: list[Row] = []
        self.steps: dict[str, Contender] = {}

    def run(self) -> list[Row]:
        model = model_config(self.pair, QUICK_WIDTH if self.options.quick else PUBLISHED_WIDTH)
        batch = random_batch(self.options.batch, model.revisits, model.bands, self.world.device)
        encoder, _, head = self.pair.partition("+")
        builders: dict[str, Callable[[], Contender]] = {
            name: lambda name=name: Ours(name, model, batch, self.options.precision, self.world)
            for name in self.options.contenders.split(",")
        }
        if self.options.published:
            folder = self.options.published
            builders["published"] = lambda: Published(folder, encoder, head, batch, self.options.precision)
        for name, build in builders.items():
            self._add(name, build)
        if self.steps:
            self._time()
            self._floor()
        return self.rows

    def _add(self, name: str, build: Callable[[], Contender]) -> None:
        row = Row(
            self.pair,
            name,
            str(self.world.device.type),
            self.options.precision,
            self.options.batch,
            torch.get_num_threads(),
        )
        self.rows.append(row)
        try:
            contender = build()
            for _ in range(WARM_UP):
                take_step(contender)
            self._synchronise()
            row.peak_mib = self._peak(contender)
            self.steps[name] = contender
        except Exception as error:  # any error: the other contenders still have their results
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            traceback.print_exc(file=sys.stderr)
            gc.collect()

    def _time(self) -> None:
        whole: dict[str, list[float]] = {name: [] for name in self.steps}
        for _ in range(self.options.repeats):
            for name, contender in self.steps.items():
                whole[name].append(self._seconds(lambda contender=contender: take_step(contender)))
        phases: dict[str, list[list[float]]] = {name: [] for name in self.steps}
        for _ in range(max(3, self.options.repeats // 2)):
            for name, contender in self.steps.items():
                phases[name].append([self._seconds(getattr(contender, phase)) for phase in PHASES])
        first = next(iter(self.steps))
        for row in self.rows:
            if row.contender not in self.steps:
                continue
            times = whole[row.contender]
            median = statistics.median(times)
            row.step_ms, row.step_ms_min, row.step_ms_max = (1e3 * t for t in (median, min(times), max(times)))
            row.ratio = statistics.median(a / b for a, b in zip(times, whole[first], strict=True))
            row.chips_per_second = self.options.batch / median
            medians = map(statistics.median, zip(*phases[row.contender], strict=True))
            row.phase_ms = {phase: 1e3 * seconds for phase, seconds in zip(PHASES, medians, strict=True)}

    def _floor(self) -> None:
        """Measure the floor of our eager network, or of the first contender, and compare every step with it."""
        plain = [name for name in self.steps if "compile" not in name and name != "published"]
        contender = self.steps[plain[0] if plain else next(iter(self.steps))]

        def work() -> None:
            contender.forward()
            contender.loss()
            contender.backward()

        floor: Floor = measure_floor(work, self._synchronise)
        contender.optimizer()
        for row in self.rows:
            if row.step_ms:
                row.flops, row.floor_ms = float(floor.flops), 1e3 * floor.seconds
                row.flop_per_second = floor.flops / (row.step_ms / 1e3)
                row.floor_share = row.floor_ms / row.step_ms

    def _seconds(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - began

    def _synchronise(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _peak(self, contender: Contender) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)
            take_step(contender)
            return torch.cuda.max_memory_allocated(self.world.device) / 2**20
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from the current resident memory
        before = _status_mib("VmRSS")
        take_step(contender)
        return _status_mib("VmHWM") - before


def take_step(contender: Contender) -> None:
    for phase in PHASES:
        getattr(contender, phase)()


def measure_loop(row: Row, uri: str, steps: int, width: int) -> None:
    """Train for a few steps by the real loop, and add its rate and its share of waiting to ``row``."""
    from benchmarks.loop import loop_figures

    engine, *flags = row.contender.split(":")
    row.loop_chips_per_second, row.data_wait_share = loop_figures(
        row.model, engine, flags, row.precision, row.batch, uri, steps, width
    )


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: list[Row]) -> str:
    """Return the rows as text, a line each."""
    heading = (
        f"{'model':20}{'contender':22}{'step, ms':>10}{'min-max':>16}{'ratio':>7}{'chips/s':>9}"
        + "".join(f"{phase:>10}" for phase in PHASES)
        + f"{'MiB':>8}{'GFLOP/s':>9}{'floor':>7}{'waits':>7}"
    )
    lines = [heading]
    for row in rows:
        if row.error:
            lines.append(f"{row.model:20}{row.contender:22}{row.error}")
            continue
        waits = "" if row.data_wait_share is None else f"{100 * row.data_wait_share:.1f}%"
        lines.append(
            f"{row.model:20}{row.contender:22}{row.step_ms:10.1f}{f'{row.step_ms_min:.0f}-{row.step_ms_max:.0f}':>16}"
            f"{row.ratio:7.3f}{row.chips_per_second:9.2f}"
            + "".join(f"{row.phase_ms[phase]:10.1f}" for phase in PHASES)
            + f"{row.peak_mib:8.0f}{row.flop_per_second / 1e9:9.1f}{100 * row.floor_share:6.0f}%{waits:>7}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=PAIRS, metavar="PAIR", help="encoder+head")
    parser.add_argument("--contenders", default="torch,deepspeed", help="the others are compared with the first")
    parser.add_argument("--published", type=Path, metavar="DIR", help="folder of the published code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 keeps the default")
    parser.add_argument("--data", metavar="URI", help="a dataset for the real loop")
    parser.add_argument("--loop-steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one small model, few repeats: only checks that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line per row")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.quick:
        options.batch, options.repeats, options.loop_steps = min(options.batch, 2), 2, 4
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = join_world()
    rows: list[Row] = []
    for pair in options.models[:1] if options.quick else options.models:
        found = Bench(pair, options, world).run()
        gc.collect()
        for row in found:
            if options.data and not row.error and row.contender != "published":
                measure_loop(row, options.data, options.loop_steps, QUICK_WIDTH if options.quick else PUBLISHED_WIDTH)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        rows += found
        print(table(found), flush=True)
    if len(rows) > len(found):
        print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
