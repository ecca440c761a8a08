"""Kit of the GPU checks for a machine without network: ``python -m benchmarks.gpu_kit``, or ``make gpu-kit``.

The folder, by default ``gpu-kit``, then holds ``wheels/`` for Python 3.12 on x86-64 Linux, with the packages that a
machine with PyTorch lacks; ``dataset/``, a few generated AOIs at the published sizes, for measurements; ``small/``,
some with a fifth of the pixels, for tests; and ``kit.json``, which lists the contents. Golden cases are in the working
tree, which is copied with the kit. `benchmarks.gpu` uses the kit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from benchmarks.build_mamba import CONSTRAINTS, ROOT, find_cuda, find_python
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")
THERE = frozenset({"torch", "triton", "numpy", "tensorboard", "safetensors", "pytest", "ninja", "psutil"})
"""Packages of the GPU machine, with all that they require."""

WHEELS = (
    # Imports of DeepSpeed.
    *("annotated-types", "einops", "hjson", "msgpack", "packaging", "py-cpuinfo", "pydantic", "pydantic_core", "tqdm"),
    *("typing-inspection", "typing_extensions"),
    # Samples are checked with it.
    "zlib-ng",
    # Everything that is read goes through its schemas.
    "msgspec",
    # Storage names its errors.
    "urllib3",
    # A limit, so that one test that hangs does not take the time of the others.
    "pytest-timeout",
)
DEEPSPEED = "deepspeed"
"""Published as source only; without its ops it is pure Python."""

UNUSED = frozenset({"transformers", "tilelang", "apache-tvm-ffi", "quack-kernels", "setuptools", "nvidia-ml-py"})
"""Requirements of mamba-ssm that nothing here imports (`import_mamba` in Pan-Mamba's scan), and a library that
DeepSpeed does not need."""

LIMIT_MIB = 55
AOIS = 6
"""AOIs of each dataset: four to train, one to validate, one to test."""
HR_SIDE = 264
"""Pixels of the generated rasters, a quarter of the real side: samples are resized to the published sizes anyway."""
SMALL = SampleOptions(revisits=2, lr_size=150, hr_size=200)
"""The smallest samples that hold nine chips."""


def pins() -> dict[str, str]:
    """Return the versions of constraints.txt by canonical name."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def pip(*arguments: str | Path, **variables: str) -> None:
    """Run this environment's pip, quietly."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True, env={**os.environ, **variables})


def platform_options() -> list[str]:
    """Return pip's options for the GPU machine's Python."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    return ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]


def gather_wheels(folder: Path) -> None:
    """Download the published wheels, and build DeepSpeed's from its source."""
    versions = pins()
    wanted = [f"{name}=={versions[canonicalize_name(name)]}" for name in WHEELS]
    pip("download", "--no-deps", *platform_options(), "--dest", folder, *wanted)
    # Not the wheel that pip may have cached from an installation here, which was built for the CPU.
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", folder)
    pip("wheel", *options, f"{DEEPSPEED}=={versions[DEEPSPEED]}", DS_BUILD_OPS="0", DS_ACCELERATOR="cuda")


def add_mamba(folder: Path, given: Path | None) -> str:
    """Copy mamba-ssm's wheel, or build it if possible; return a sentence that reports the action."""
    if given is not None:
        shutil.copyfile(given, folder / given.name)
        return f"mamba-ssm: {given.name}, as given"
    if find_python() is None or find_cuda() is None:
        return "mamba-ssm: skipped, because there is no python3.12 with nvcc here; name a wheel with MAMBA_WHEEL=FILE"
    subprocess.run([sys.executable, "-m", "benchmarks.build_mamba", "--output", str(folder)], check=True, cwd=ROOT)
    return "mamba-ssm: built"


def make_datasets(folder: Path) -> None:
    """Shard generated AOIs twice, two per shard: 3.4 MB each at the published sizes, and 0.6 MB."""
    with tempfile.TemporaryDirectory() as source:
        write_worldstrat(source, AOIS, seed=15, hr_side=HR_SIDE)
        for name, sample, shard_bytes in (("dataset", SampleOptions(), 7_000_000), ("small", SMALL, 1_300_000)):
            options = ShardOptions(sample, PlanOptions(shard_bytes=shard_bytes))
            shard_folder(Path(source), open_storage(folder / name), options, workers=1, say=lambda _: None)


def requirements(wheel: Path) -> Iterator[str]:
    """Yield the names of the requirements of a wheel on the GPU machine."""
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    for line in headers.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield canonicalize_name(requirement.name)


def missing(wheels: Sequence[Path]) -> dict[str, str]:
    """Return the packages that neither kit nor GPU machine has, and the wheel that needs each."""
    there = {parse_wheel_filename(wheel.name)[0] for wheel in wheels} | THERE | UNUSED
    return {name: wheel.name for wheel in wheels for name in requirements(wheel) if name not in there}


def check_installation(folder: Path) -> int:
    """Install the kit as the GPU machine would, into a temporary folder; return the number of wheels.

    Raises:
        ValueError: A wheel needs a package that neither the kit nor that machine has.
        subprocess.CalledProcessError: pip does not find or accept a wheel for that Python.
    """
    wheels = sorted((folder / "wheels").glob("*.whl"))
    if absent := missing(wheels):
        raise ValueError(f"the kit is not complete: {absent}; add these to WHEELS in {Path(__file__).name}")
    names = ["==".join(map(str, parse_wheel_filename(wheel.name)[:2])) for wheel in wheels]
    with tempfile.TemporaryDirectory() as target:
        options = ("--no-index", "--no-deps", "--no-compile", "--find-links", folder / "wheels", "--target", target)
        pip("install", *options, *platform_options(), *names, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    return len(wheels)


def sizes(folder: Path) -> Mapping[str, int]:
    """Return the bytes of each part of the kit."""
    parts = {part.name: part for part in sorted(folder.iterdir())}
    return {
        name: sum(file.stat().st_size for file in [part, *part.rglob("*")] if file.is_file())
        for name, part in parts.items()
    }


def gather(folder: Path, mamba: Path | None) -> None:
    """Build the kit from scratch, in a folder that gets its final name only when it is complete."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "wheels").mkdir(parents=True)
    gather_wheels(building / "wheels")
    print(add_mamba(building / "wheels", mamba))
    make_datasets(building)
    wheels = sorted(wheel.name for wheel in (building / "wheels").iterdir())
    (building / "kit.json").write_text(json.dumps({"python": PYTHON, "wheels": wheels}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-kit", help="the kit's folder; overwritten")
    parser.add_argument("--mamba-wheel", type=Path, help="wheel of mamba-ssm for the GPU machine (default: built here)")
    options = parser.parse_args()
    gather(options.output, options.mamba_wheel)
    taken = sizes(options.output)
    for name, size in taken.items():
        print(f"{name:10} {size / 2**20:6.1f} MiB")
    total = sum(taken.values()) / 2**20
    count = check_installation(options.output)
    print(f"{options.output}: {total:.1f} MiB of {LIMIT_MIB}")
    print(f"its {count} wheels install for Python {PYTHON} with --no-index")
    if total > LIMIT_MIB:
        sys.exit(f"the kit has {total:.1f} MiB, and {LIMIT_MIB} may be sent: drop something")


if __name__ == "__main__":
    main()
