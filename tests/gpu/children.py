"""What the GPU tests run in processes of their own: DeepSpeed settles its device when it is imported.

``python -m tests.gpu.children train CONFIG`` trains, ``... carry CONFIG FROM TO`` has an engine of each ZeRO stage take
the newest checkpoint of the run folder FROM and publish its state in TO-<stage>.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from models.registry import build_model
from pipeline.config import RunConfig, load_config
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.training.checkpoint import newest_checkpoint, save_checkpoint
from pipeline.training.loop import run_training
from pipeline.world import join_world
from sharding.storage import open_storage

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""Limit of a process: on a fresh machine DeepSpeed compiles its CPU op first."""


def run(device: torch.device, mode: str, config: RunConfig, *folders: Path) -> None:
    """Run a mode on ``device``, where a CPU process sees no GPU; fail with what it wrote if it fails."""
    file = Path(config.output.uri).with_suffix(f".{mode}.toml")
    file.write_text(config.to_toml())
    environment = dict(os.environ, DS_ACCELERATOR=device.type)
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.gpu.children", mode, str(file), *map(str, folders)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, f"{' '.join(command[2:])}:\n{ended.stdout}\n{ended.stderr}"
    assert f"computed on {device.type}" in ended.stdout


def forbid_tf32() -> None:
    """Keep TF32 out of products and convolutions, as bounds for float32 ask."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        backend.fp32_precision = "ieee"


def carry(config: RunConfig, source: str, target: str) -> None:
    """Publish in ``target-<stage>`` what an engine of each stage makes of the checkpoint in ``source[-<stage>]``."""
    world = join_world()
    plan = BatchPlan.create(config.train.global_batch, config.train.micro_batch, world.size)
    for stage in range(4):
        folder = Path(f"{source}-{stage}")
        checkpoint = newest_checkpoint(open_storage(folder if folder.exists() else source))
        assert checkpoint is not None
        train = replace(config.train, zero_stage=stage)
        engine = make_engine(build_model(config.model).to(world.device), train, plan, world, checkpoint.state)
        step = checkpoint.state.step
        generators = checkpoint.generators
        runs = open_storage(Path(f"{target}-{stage}"))
        save_checkpoint(runs, f"step-{step}", config, checkpoint.position, engine.state(step), generators)


def main(mode: str, config: str, *folders: str) -> None:
    forbid_tf32()
    run_config = load_config(config)
    if mode == "train":
        run_training(run_config)
    else:
        carry(run_config, *folders)
    print("computed on", join_world().device.type)


if __name__ == "__main__":
    main(*sys.argv[1:])
