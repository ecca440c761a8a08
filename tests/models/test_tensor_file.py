"""Files of tensors are read as data: what else is pickled in them does nothing, and damaged ones end in a sentence."""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import resource
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.config import ModelConfig
from models.published import load_published, read_published, to_published
from models.registry import build_model
from models.tensor_file import Foreign, read_tensors

CONFIG = ModelConfig("highresnet", "pannet", revisits=5, hidden=4)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        for name, data in files.items():
            made.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def pickled(*operations: bytes, data: bytes = bytes(16)) -> bytes:
    """Return a file whose structure is these opcodes."""
    return archive({"data.pkl": b"\x80\x02" + b"".join(operations) + b".", "data/0": data})


@pytest.fixture
def lightning() -> Iterator[types.SimpleNamespace]:
    """Classes named as those of Lightning and torchvision, which exist only while a file is written."""
    before = set(sys.modules)

    def define(module: str, made: type) -> Any:
        for end in range(1, module.count(".") + 2):
            name = ".".join(module.split(".")[:end])
            sys.modules.setdefault(name, types.ModuleType(name))
        made.__module__, made.__qualname__ = module, made.__name__
        setattr(sys.modules[module], made.__name__, made)
        return made

    transforms = "torchvision.transforms.transforms"
    yield types.SimpleNamespace(
        Compose=define(transforms, type("Compose", (), {})),
        Resize=define(transforms, type("Resize", (torch.nn.Module,), {})),
        Mode=define("torchvision.transforms.functional", enum.Enum("InterpolationMode", {"BILINEAR": "bilinear"})),
        AttributeDict=define("pytorch_lightning.utilities.parsing", type("AttributeDict", (dict,), {})),
        Metric=define("torchmetrics.aggregation", type("MeanMetric", (torch.nn.Module,), {})),
    )
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_of_the_trainer_loads_with_its_values(lightning: types.SimpleNamespace, tmp_path: Path) -> None:
    source = build_model(CONFIG)
    state = OrderedDict((f"backbone.{name}", value) for name, value in to_published(source).items())
    compose, resize = lightning.Compose(), lightning.Resize()
    resize.size, resize.interpolation = [50, 50], lightning.Mode.BILINEAR
    compose.transforms = [resize]
    content = {
        "epoch": 19,
        "global_step": 6200,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state | {"shifter.shift_kernels": torch.ones(81, 1, 11, 11)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 20}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val/loss'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"T_0": 300, "last_epoch": 19}],
        "hparams_name": "kwargs",
        "hyper_parameters": lightning.AttributeDict(transforms={"lr": compose}, metric=lightning.Metric(), lr=1e-4),
    }
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "pytorch_lightning")]:
        del sys.modules[name]
    read = read_tensors(path)
    assert isinstance(read, dict)
    assert read["hyper_parameters"] == Foreign("pytorch_lightning.utilities.parsing", "AttributeDict")
    assert (read["epoch"], read["callbacks"].keys()) == (19, content["callbacks"].keys())  # type: ignore[attr-defined]
    copy = build_model(CONFIG)
    load_published(copy, read_published(path))
    for name, value in source.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name
    assert "torchvision" not in sys.modules


EVALUATED = b"__import__('os').system('touch EXECUTED')"
PLANTED = {
    "reduce": b"cos\nsystem\nX\x0e\x00\x00\x00touch EXECUTED\x85R",
    "instance": b"(X\x0e\x00\x00\x00touch EXECUTEDios\nsystem\n",
    "object": b"(cos\nsystem\nX\x0e\x00\x00\x00touch EXECUTEDo",
    "new object": b"cos\nsystem\nX\x0e\x00\x00\x00touch EXECUTED\x85\x81",
    "stack global": b"\x8c\x08builtins\x8c\x04eval\x93\x8c" + bytes([len(EVALUATED)]) + EVALUATED + b"\x85R",
    "state": b"cbuiltins\nset\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsbX\x01\x00\x00\x00ab",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b",
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_call_does_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = read_tensors(pickled(b"}X\x01\x00\x00\x00a", PLANTED[case], b"s"))
    assert isinstance(read, dict)
    assert isinstance(read["a"], Foreign)
    assert list(tmp_path.iterdir()) == []


def storage(count: int) -> bytes:
    number = b"\x8a\x08" + count.to_bytes(8, "little", signed=True)
    return b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number + b"tQ"


def tensor(count: int, offset: bytes, shape: bytes, strides: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count) + offset + shape + strides + b"\x89}tR"


HUGE = b"\x8a\x08" + (10**12).to_bytes(8, "little")
HARMFUL = {
    "more values than bytes": (tensor(10**12, b"K\x00", HUGE + b"\x85", b"K\x01\x85"), "array of 1000000000000 values"),
    "beyond its storage": (tensor(4, b"K\x03", b"K\x02\x85", b"K\x01\x85"), r"shape \[2\] in a storage of 4"),
    "before its storage": (tensor(4, b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"), "impossible shape"),
    "repeated": (tensor(4, b"K\x00", HUGE + b"\x85", b"K\x00\x85"), r"shape \[1000000000000\] in a storage of 4"),
    "negative count": (storage(-1), "damaged"),
    "set": (b"\x8f" * 9, "pickled set"),
    "numbered class": (b"\x82\x01", "names a class by the number"),
    "deep key": (b"}" + b")" + b"\x85" * 300_000 + b"K\x01s", "is damaged"),
    "memo of 4 billion": (b"Nr\xff\xff\xff\xff", None),
    "bytes that are not there": (b"\x8e" + (10**12).to_bytes(8, "little") + b"x", "is damaged"),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_harmful_structure_takes_no_memory(case: str) -> None:
    operations, words = HARMFUL[case]
    with limited_memory(1 << 30):
        if words is None:
            read_tensors(pickled(operations))
            return
        with pytest.raises(ValueError, match=words):
            read_tensors(pickled(operations))


def test_compressed_overlapping_and_huge_parts_are_refused() -> None:
    bomb = {"data.pkl": b"\x80\x02" + storage(1 << 26) + b".", "data/0": bytes(1 << 28)}
    with pytest.raises(ValueError, match="compressed part"):
        read_tensors(archive(bomb, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="more than it can hold"):
        read_tensors(archive({"data.pkl": b"\x80\x02(" + b"]" * (9 << 20) + b"l."}))
    with pytest.raises(ValueError, match="another byte order"):
        read_tensors(archive({"data.pkl": b"N.", "byteorder": b"big"}))


class limited_memory:
    """Limit of the address space that this process may add."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + self.more, self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


PLAIN = (torch.Tensor, torch.Size, torch.dtype, Foreign, str, bytes, bytearray, bool, int, float, complex)
WHOLE = saved(to_published(build_model(CONFIG)))
START = WHOLE.index(b"data.pkl")


def assert_plain(value: object) -> None:
    """Fail unless a value is made of tensors, plain values and placeholders alone."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        else:
            assert value is None or isinstance(value, PLAIN), type(value)


@given(st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_damage_ends_in_a_sentence_or_in_tensors(data: st.DataObject) -> None:
    """Any error but `ValueError` fails, one of memory too."""
    damaged = bytearray(WHOLE)
    # Most in the structure, where they matter.
    places = st.one_of(st.integers(START, START + 4000), st.integers(0, len(WHOLE) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    with limited_memory(1 << 30), contextlib.suppress(ValueError):
        assert_plain(read_tensors(bytes(damaged[:cut])))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_opcodes_end_in_a_sentence_or_in_values(operations: bytes) -> None:
    """Any error but `ValueError` fails, one of memory too."""
    with limited_memory(1 << 30), contextlib.suppress(ValueError):
        assert_plain(read_tensors(pickled(operations)))


def test_reading_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, models.tensor_file, pathlib\n"
        "before = set(sys.modules)\n"
        "models.tensor_file.read_tensors(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(sorted(set(sys.modules) - before - {'encodings.cp437'}))"
    )
    file = tmp_path / "file.pt"
    file.write_bytes(pickled(b"}X\x01\x00\x00\x00acantigravity\nfly\n)Rs"))
    imported = subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True)
    assert imported.stdout == "[]\n"
