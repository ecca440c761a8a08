"""Attention without its matrix against the form with it: time and memory of U2Net's and INNformer's forward pass.

``python -m benchmarks.attention``. Each form runs in a process of its own, in turn with the other, several times;
medians are printed. U2Net's n x n weights need 16 GiB of free memory at 156 x 156.

``python -m benchmarks.attention``. Each form runs in a process of its own, in turn with the other, several times;
medians are printed. U2Net's n x n weights need 16 GiB of free memory at 156 x 156.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig
from models.registry import HEADS


def n_by_n(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return U2Net's spatial attention as the paper writes it: products, scale, softmax, products."""
    weights = torch.matmul(query, key.transpose(-2, -1)) * 0.25
    return torch.matmul(weights.softmax(dim=-1), value)


def all_similarities(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return INNformer's search as the paper writes it, through the similarities of all windows [P, 576, 576]."""
    queries, keys = F.unfold(query, 3, padding=1), F.unfold(key, 3, padding=1)
    similarity = torch.bmm(F.normalize(queries, dim=1).transpose(1, 2), F.normalize(keys, dim=1))
    cosine, index = similarity.max(dim=1)
    chosen = queries.gather(2, index.unsqueeze(1).expand_as(queries))
    return F.fold(chosen, query.shape[2:], 3, padding=1) / 9, cosine.view(-1, 1, *query.shape[2:])


PAPER: dict[str, dict[str, Callable[..., object]]] = {
    "u2net": {"models.heads.u2net.spatial_attention": n_by_n},
    "innformer": {"models.heads.innformer.transfer": all_similarities, "models.heads.innformer.CHUNK": 10**9},
}
"""The paper's form of our function, by head."""

NEEDED_GIB = 16


def measure(head: str, form: str, graph: bool, size: int) -> dict[str, float]:
    """Return seconds, peak MiB above the initial resident memory, and the mean of the result; call it in a fresh
    process.
    """
    torch.manual_seed(0)
    model = HEADS[head](ModelConfig("none", head))
    images = torch.rand(1, 3, size, size), torch.rand(1, 1, size, size)
    for name, value in PAPER[head].items() if form == "paper" else ():
        patch(name, value).start()

    def forward(side: int = size) -> float:
        with torch.set_grad_enabled(graph):
            return model(*(image[..., :side, :side] for image in images)).mean().item()

    forward(24)  # loads libraries and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from here
    before = _kib("/proc/self/status", "VmRSS")
    mean = forward()
    peak = (_kib("/proc/self/status", "VmHWM") - before) / 1024
    start = time.perf_counter()
    forward()
    return {"s": time.perf_counter() - start, "mib": peak, "mean": mean}


def _kib(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--size", type=int, default=156)
    parser.add_argument("--runs", type=int, default=3, help="processes of each form")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("HEAD", "FORM", "GRAPH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        head, form, graph = options.one
        print(json.dumps(measure(head, form, graph == "graph", options.size)))
        return
    free = _kib("/proc/meminfo", "MemAvailable") / 2**20
    if "u2net" in options.heads and free < NEEDED_GIB:
        raise SystemExit(f"u2net's n x n weights need {NEEDED_GIB} GiB, and {free:.0f} GiB are free")
    print(f"{options.threads} threads, batch 1, {options.size} x {options.size}, float32, medians of {options.runs}")
    print(f"\n{'forward':34}{'s':>8}{'MiB':>10}{'slower':>10}{'larger':>10}{'mean':>14}")
    for head in options.heads:
        for graph in ("no graph", "graph"):
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "paper": []}
            for _ in range(options.runs):
                for form, got in runs.items():
                    command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:], "--one", head, form, graph]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    got.append(json.loads(done.stdout))
            _print(f"{head}, {graph}", runs)


def _print(title: str, runs: dict[str, list[dict[str, float]]]) -> None:
    medians = {}
    for form, got in runs.items():
        medians[form] = {unit: statistics.median(run[unit] for run in got) for unit in got[0]}
    for form, got in medians.items():
        ratios = "".join(f"{got[unit] / medians['ours'][unit]:>9.1f}x" for unit in ("s", "mib"))
        print(f"{title + ', ' + form:34}{got['s']:>8.2f}{got['mib']:>10.1f}{ratios}{got['mean']:>14.9f}", flush=True)


if __name__ == "__main__":
    main()
