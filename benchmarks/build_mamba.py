"""Build of mamba-ssm as a wheel for H100 and H200 only: ``python -m benchmarks.build_mamba --output FOLDER``.

No wheel is published, and the published build makes machine code for nine GPU architectures. This build takes eight
minutes on two cores, and its wheel has 11 MB; with line information and without compression the wheel has 39 MB. It
needs the network, nvcc 13.0 and Python 3.12. It creates an environment with the PyTorch of the GPU machine, 4.7 GB,
beside the wheel's source in a temporary folder; ``--python`` names the interpreter of an environment that has PyTorch
already.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
TORCH = "2.11.0"
"""PyTorch of the GPU machine; PyPI's build of it for Python 3.12 is that for CUDA 13.0."""
ARCHITECTURE = "90"
TOOLS = ("setuptools", "wheel", "packaging", "ninja", "numpy")
GENCODE = re.compile(r'^ *cc_flag\.append\("-gencode"\)\n *cc_flag\.append\("arch=compute_(\d+),code=sm_\d+"\)\n', re.M)
CUDA_IF = re.compile(r"^ *if bare_metal_version >= Version\([^)]*\):\n(?! +cc_flag)", re.M)


def for_one_gpu(setup: str) -> str:
    """Return mamba-ssm's setup.py with one architecture, one thread, no line information, and smaller code.

    It ignores TORCH_CUDA_ARCH_LIST.

    Raises:
        ValueError: The text is not the setup.py that this script knows.
    """
    found = GENCODE.findall(setup)
    setup = GENCODE.sub(lambda match: match[0] if match[1] == ARCHITECTURE else "", setup)
    setup = CUDA_IF.sub("", setup)
    changes = (('"--threads", "4"', '"--threads", "1"'), ('"-lineinfo"', '"--compress-mode=size"'))
    if ARCHITECTURE not in found or not all(before in setup for before, _ in changes):
        raise ValueError("setup.py of mamba-ssm is not the one that this script knows: compare its compiler flags")
    for before, after in changes:
        setup = setup.replace(before, after)
    return setup


def pinned(name: str) -> str:
    """Return ``name==version`` from constraints.txt."""
    match = re.search(rf"^{re.escape(name)}==\S+$", CONSTRAINTS.read_text(encoding="utf-8"), re.M)
    if match is None:
        raise ValueError(f"{name} has no line in {CONSTRAINTS.name}")
    return match[0]


def call(*command: str | Path, folder: Path | None = None, **variables: str) -> None:
    """Print a command, then run it."""
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=folder, env={**os.environ, **variables})


def make_environment(folder: Path, python: str) -> Path:
    """Make an environment with PyTorch and the imports of the build; return its interpreter."""
    call(python, "-m", "venv", folder)
    call(folder / "bin/python", "-m", "pip", "install", "--quiet", f"torch=={TORCH}", *TOOLS)
    return folder / "bin/python"


def unpack_source(folder: Path, python: Path) -> Path:
    """Download the source and change its setup.py; return its folder."""
    options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    # pip builds its metadata, which needs no compiler.
    name = pinned("mamba-ssm")
    call(python, "-m", "pip", "download", *options, "--dest", folder, name, MAMBA_SKIP_CUDA_BUILD="TRUE")
    [archive] = folder.glob("mamba_ssm-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    setup = unpacked / "setup.py"
    setup.write_text(for_one_gpu(setup.read_text(encoding="utf-8")), encoding="utf-8")
    return unpacked


def build(output: Path, cuda: Path, python: str, has_torch: bool, jobs: int) -> None:
    """Build the wheel into ``output``."""
    with tempfile.TemporaryDirectory(prefix="mamba-") as temporary:
        folder = Path(temporary)
        interpreter = Path(python) if has_torch else make_environment(folder / "environment", python)
        source = unpack_source(folder, interpreter)
        # Without MAMBA_FORCE_BUILD the build tries a download first.
        variables = {"CUDA_HOME": str(cuda), "MAMBA_FORCE_BUILD": "TRUE", "MAX_JOBS": str(jobs)}
        options = ("--no-deps", "--no-build-isolation", "--wheel-dir", output.resolve())
        call(interpreter, "-m", "pip", "wheel", *options, ".", folder=source, **variables)


def find_python() -> str | None:
    """Return a Python 3.12 that starts."""
    path = shutil.which("python3.12")
    if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
        return path
    return None


def find_cuda() -> Path | None:
    """Return the folder of the CUDA toolkit."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return home if (home / "bin/nvcc").exists() else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the wheel")
    parser.add_argument("--python", help=f"a Python 3.12 that imports torch {TORCH} (default: a new environment)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    python, cuda = options.python or find_python(), find_cuda()
    if python is None:
        sys.exit("python3.12 is not on the PATH: name one with --python")
    if cuda is None:
        sys.exit("no nvcc: install the CUDA 13.0 toolkit and set CUDA_HOME to its folder")
    build(options.output, cuda, python, bool(options.python), options.jobs)


if __name__ == "__main__":
    main()
