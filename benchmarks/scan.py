"""Time and memory of the selective scan, forward and backward: ``python -m benchmarks.scan``.

Each form runs in a process of its own, so that its peak memory is its own: one step at a time, our chunks, and the
kernel of mamba_ssm where it is installed and there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads.pan_mamba.scan import chunked_scan, selective_scan


def step_by_step(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan with one operation per token under autograd; work that needs no loop is outside of it."""
    decays = torch.exp(delta.unsqueeze(-1) * A).unbind(1)
    terms = ((delta * x).unsqueeze(-1) * B.unsqueeze(2)).unbind(1)
    state = torch.zeros_like(terms[0])
    states = []
    for decay, term in zip(decays, terms, strict=True):
        state = torch.addcmul(term, decay, state)
        states.append(state)
    return torch.einsum("bnck,bnk->bnc", torch.stack(states, dim=1), C) + D * x


FORMS: dict[str, Callable[..., Tensor]] = {
    "steps": step_by_step,
    "chunks": chunked_scan,
    "mamba_ssm": selective_scan,
}


def arguments(options: argparse.Namespace, tokens: int, device: torch.device) -> list[Tensor]:
    """Return the arguments that Mamba passes to the scan when training begins."""
    torch.manual_seed(0)
    sequence = (options.batch, tokens)
    values = [
        torch.randn(*sequence, options.channels),
        F.softplus(torch.randn(*sequence, options.channels) - 4.6),
        -torch.arange(1.0, options.states + 1).repeat(options.channels, 1),
        torch.randn(*sequence, options.states),
        torch.randn(*sequence, options.states),
        torch.ones(options.channels),
    ]
    return [value.to(device).requires_grad_() for value in values]


def peak(device: torch.device) -> int:
    """Return the peak of used memory, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return median seconds forward, forward and backward, and the bytes that both need in addition to the inputs."""
    scan = FORMS[options.form]
    for tokens in (2, options.tokens):  # the first call loads libraries, whose memory is not the scan's
        inputs = arguments(options, tokens, device)
        before = peak(device)
        torch.autograd.grad(scan(*inputs).sum(), inputs)
    forward, both = [], []
    for _ in range(options.repeats):
        began = time.perf_counter()
        y = scan(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize()
        forward.append(middle - began)
        both.append(time.perf_counter() - began)
        del y
    return {
        "forward": statistics.median(forward),
        "both": statistics.median(both),
        "bytes": peak(device) - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24336)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--form", choices=tuple(FORMS), help="measure this one, here, and print JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.form:
        print(json.dumps(measure(options, device)))
        return
    forms = [form for form in FORMS if form != "mamba_ssm" or device.type == "cuda"]
    shape = f"{options.batch} x {options.tokens} tokens, {options.channels} channels, {options.states} states"
    print(f"{device}, {torch.get_num_threads()} threads, {shape}")
    print(f"{'form':12}{'forward, ms':>12}{'and backward, ms':>20}{'MiB':>12}{'x faster':>12}{'x smaller':>12}")
    first: dict[str, float] = {}
    for form in forms:
        command = [sys.executable, "-m", "benchmarks.scan", *sys.argv[1:], "--form", form]
        ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        found = json.loads(ended.stdout)
        first = first or found
        line = f"{1000 * found['forward']:12.1f}{1000 * found['both']:20.1f}{found['bytes'] / 2**20:12.1f}"
        print(
            f"{form:12}{line}{first['both'] / found['both']:12.1f}{first['bytes'] / found['bytes']:12.1f}", flush=True
        )


if __name__ == "__main__":
    main()
