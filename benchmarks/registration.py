"""Registered squared error, forward and backward, against the form that keeps 81 copies.

``python -m benchmarks.registration``. Each form runs in a process of its own. Results are its peak of resident memory
above the initial one, and its time.
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

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.quality.registration import HALF_WIDTH, PUBLISHED_CROP, STEPS, Mode, register, shift_kernels

COPIES = len(STEPS) ** 2


def ours(prediction: Tensor, target: Tensor, mode: Mode) -> Tensor:
    """Return the least mean squared error of each sample [B]."""
    pair = register(prediction, target, mode)
    return (pair.prediction - pair.target).square().mean(dim=(1, 2, 3))


def one_convolution(prediction: Tensor, target: Tensor, mode: Mode) -> Tensor:
    """Return the same from 81 shifted targets by 81 kernels of 11 x 11; autograd runs through the least error."""
    kernels = shift_kernels(mode).to(target)
    taps = kernels.shape[1]
    grid = torch.einsum("im,jn->ijmn", kernels, kernels).reshape(COPIES, 1, taps, taps)
    return _least(prediction, F.conv2d(target.flatten(0, 1).unsqueeze(1), grid), mode)


def separable(prediction: Tensor, target: Tensor, mode: Mode) -> Tensor:
    """Return the same from 81 shifted targets by 9 kernels down and 9 across."""
    kernels = shift_kernels(mode).to(target)
    count, taps = kernels.shape
    rows = F.conv2d(target.flatten(0, 1).unsqueeze(1), kernels.view(count, 1, taps, 1))
    across = kernels.repeat(count, 1).view(COPIES, 1, 1, taps)
    return _least(prediction, F.conv2d(rows, across, groups=count), mode)


def _least(prediction: Tensor, shifted: Tensor, mode: Mode) -> Tensor:
    height, width = shifted.shape[-2:]
    first = HALF_WIDTH if mode == "centred" else PUBLISHED_CROP
    cropped = prediction[:, :, None, first : first + height, first : first + width]
    error = cropped - shifted.view(*prediction.shape[:2], COPIES, height, width)
    return error.square().mean(dim=(1, 3, 4)).amin(dim=1)


FORMS: dict[str, Callable[[Tensor, Tensor, Mode], Tensor]] = {
    "ours": ours,
    "81 copies, one convolution": one_convolution,
    "81 copies, separable": separable,
}


def measure(form: str, mode: Mode, batch: int, size: int, repeats: int) -> dict[str, float]:
    """Return milliseconds (median), peak MiB and the loss of one form; call it once in a fresh process."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(batch, 3, size, size, generator=generator)
    noise = torch.rand(target.shape, generator=generator)
    prediction = (target.roll((1, -1), (2, 3)) + 0.3 * noise).requires_grad_()

    def step(images: int = batch, side: int = size) -> float:
        prediction.grad = None
        loss = FORMS[form](prediction[:images, :, :side, :side], target[:images, :, :side, :side], mode).mean()
        loss.backward()
        return loss.item()

    step(1, 24)  # loads libraries and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from here
    before = _status("VmRSS")
    loss = step()
    peak = (_status("VmHWM") - before) / 1024
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"ms": 1000 * statistics.median(times), "mib": peak, "loss": loss}


def _status(field: str) -> int:
    """Return a field of this process's status, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=156)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("FORM", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(*options.one, options.batch, options.size, options.repeats)))
        return
    print(f"{options.threads} threads, batch {options.batch}, 3 x {options.size} x {options.size}, float32")
    mode: Mode
    for mode in ("centred", "published"):
        print(f"\n{mode + ' registration':28}{'ms':>10}{'MiB':>10}{'slower':>10}{'larger':>10}{'loss':>14}")
        first: dict[str, float] = {}
        for form in FORMS:
            command = [sys.executable, "-m", "benchmarks.registration", *sys.argv[1:], "--one", form, mode]
            got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            first = first or got
            ratios = "".join(f"{got[unit] / first[unit]:>9.1f}x" for unit in ("ms", "mib"))
            print(f"{form:28}{got['ms']:>10.1f}{got['mib']:>10.1f}{ratios}{got['loss']:>14.9f}")


if __name__ == "__main__":
    main()
