from __future__ import annotations

import dataclasses
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UnusableError, UserError
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.sources.worldstrat.files import MAX_BYTES, Source, open_source
from sharding.sources.worldstrat.layout import AoiFiles, check_files, find_aois
from tests.sharding.archives import claim, damage, pack
from tests.sharding.conftest import World, aois_of

THREE = SampleOptions(revisits=3)
METHODS = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED}


@pytest.fixture
def zips(tiny: World, tmp_path: Path) -> World:
    """`tiny` as the published zips, which a test may damage."""
    return World(pack(tiny.folder, tmp_path / "zips"), tiny.names)


@pytest.fixture
def member(zips: World) -> str:
    """A member of `zips`: the first AOI's PAN."""
    return f"hr_dataset/{zips.names[0]}/{zips.names[0]}_pan.tiff"


def same(ours: AoiFiles, theirs: AoiFiles, options: SampleOptions) -> None:
    assert ours.name == theirs.name
    listed = [[(file.name, file.size) for file in aoi.used(options)] for aoi in (ours, theirs)]
    assert listed[0] == listed[1]
    first, second = make_sample(ours, options), make_sample(theirs, options)
    assert first.meta == second.meta
    assert first.bytes_in == second.bytes_in == sum(size for _, size in listed[0])
    for name in ("lr", "clm", "hr", "pan"):
        assert np.array_equal(first.images[name], second.images[name])


def refusal(folder: Path, name: str) -> UnusableError:
    """Return why an AOI is refused; the others must not be."""
    found = find_aois(open_source(folder, "l2a"))
    errors = {}
    for aoi in found:
        try:
            check_files(aoi, THREE)
            make_sample(aoi, THREE)
        except UnusableError as error:
            errors[aoi.name] = error
    assert list(errors) == [name]
    return errors[name]


@pytest.mark.parametrize("method", METHODS)
def test_zips_give_the_folders_samples(tiny: World, tmp_path: Path, method: str) -> None:
    folder = pack(tiny.folder, tmp_path / "zips", METHODS[method])
    found = aois_of(folder)
    assert len(found) == 6
    for ours, theirs in zip(found, aois_of(tiny.folder), strict=True):
        same(ours, theirs, THREE)
        same(ours, theirs, dataclasses.replace(THREE, bands="all", hr="rgbn", dtype="float32"))


def test_real_zips_give_the_folders_samples_and_nothing_is_unpacked(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "few"
    for name in ("Amnesty POI-20-2-2", "Landcover-655933"):
        for part in ("hr_dataset", "lr_dataset"):
            shutil.copytree(shared / "worldstrat-sample" / part / name, few / part / name)
    folder = pack(few, tmp_path / "zips", zipfile.ZIP_STORED)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(temporary)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for ours, theirs in zip(aois_of(folder), aois_of(few), strict=True):
        same(ours, theirs, SampleOptions())
        assert not list(temporary.iterdir())
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_and_a_zip_may_be_mixed(tiny: World, tmp_path: Path) -> None:
    folder = pack(tiny.folder, tmp_path / "mixed")
    (folder / "hr_dataset.zip").unlink()
    shutil.copytree(tiny.folder / "hr_dataset", folder / "hr_dataset")
    for ours, theirs in zip(aois_of(folder), aois_of(tiny.folder), strict=True):
        same(ours, theirs, THREE)


def test_a_part_that_is_there_twice_is_refused(zips: World, tiny: World) -> None:
    shutil.copytree(tiny.folder / "lr_dataset", zips.folder / "lr_dataset")
    with pytest.raises(UserError, match=r"holds both lr_dataset/ and lr_dataset_l2a\.zip: move one of them away"):
        open_source(zips.folder, "l2a")


def test_the_directory_is_read_once_and_what_workers_get_is_small(zips: World) -> None:
    aois = aois_of(zips.folder)
    for name in ("hr_dataset.zip", "lr_dataset_l2a.zip"):
        path = zips.folder / name
        with zipfile.ZipFile(path) as archive:
            os.truncate(path, archive.start_dir)
    for aoi in aois:
        sent = pickle.dumps(aoi)
        assert len(sent) < 5_000
        assert make_sample(pickle.loads(sent), THREE).aoi == aoi.name  # noqa: S301 (our own)


def test_zip64_beyond_four_gigabytes(tiny: World, tmp_path: Path) -> None:
    """Members behind a hole of 5 GiB, which takes no disk."""
    folder = pack(tiny.folder, tmp_path / "zips")
    (folder / "hr_dataset.zip").unlink()
    with zipfile.ZipFile(folder / "hr_dataset.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hr_dataset/", "")
        archive.start_dir = 5 << 30
        for path in sorted(tiny.folder.glob("hr_dataset/*/*")):
            with archive.open(str(path.relative_to(tiny.folder)), "w", force_zip64=True) as file:
                file.write(path.read_bytes())
    ours = aois_of(folder)
    assert min(file.member.offset for aoi in ours for file in aoi.hr.values() if file.member) >= 5 << 30
    for mine, theirs in zip(ours, aois_of(tiny.folder), strict=True):
        same(mine, theirs, THREE)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_zip_that_is_none_or_cut_is_refused(zips: World, kept: float) -> None:
    path = zips.folder / "hr_dataset.zip"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))] if kept else b"<html>not found</html>")
    with pytest.raises(UserError, match=r"hr_dataset\.zip is no whole zip .*download it again"):
        open_source(zips.folder, "l2a")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["signature", "name", "data", "end"])
def test_a_damaged_member_is_told(tiny: World, tmp_path: Path, member: str, method: str, part: str) -> None:
    path = pack(tiny.folder, tmp_path / "other", METHODS[method]) / "hr_dataset.zip"
    with zipfile.ZipFile(path) as archive:
        packed = archive.getinfo(member).compress_size
    data = 30 + len(member)
    damage(path, member, {"signature": 0, "name": data - 3, "data": data + packed // 2, "end": data + packed - 2}[part])
    error = refusal(path.parent, tiny.names[0])
    assert error.reason == "damaged-member"
    assert "_pan.tiff in hr_dataset.zip" in error.detail
    words = {"signature": "does not begin where", "name": "is called"}.get(part, "CRC-32|be inflated|bytes")
    assert re.search(words, error.detail)


def test_a_member_that_ends_early_is_told(zips: World, member: str) -> None:
    path = zips.folder / "hr_dataset.zip"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    claim(path, member, size=info.file_size + 1)
    assert refusal(zips.folder, zips.names[0]).reason == "damaged-member"
    claim(path, member, size=info.file_size, packed=info.compress_size // 2)
    assert refusal(zips.folder, zips.names[0]).reason == "damaged-member"
    claim(path, member, packed=MAX_BYTES)
    error = refusal(zips.folder, zips.names[0])
    assert error.reason == "damaged-member"
    assert "is cut at the end of the zip" in error.detail


def test_absurd_sizes_are_told_and_never_allocated(zips: World, member: str) -> None:
    path = zips.folder / "hr_dataset.zip"
    for fields in ({"size": MAX_BYTES + 1}, {"size": 0xFFFFFFFE}, {"size": 10, "packed": MAX_BYTES + 1}):
        claim(path, member, **fields)
        error = refusal(zips.folder, zips.names[0])
        assert error.reason == "absurd-size"
        assert f"the most is {MAX_BYTES}" in error.detail


def test_a_bomb_is_not_inflated(zips: World, member: str) -> None:
    path = zips.folder / "hr_dataset.zip"
    other = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, bytes(200 << 20) if info.filename == member else old.read(info))
    other.replace(path)
    claim(path, member, size=5000)
    error = refusal(zips.folder, zips.names[0])
    assert error.reason == "damaged-member"
    assert "more than the 5000 bytes it claims" in error.detail


def test_encrypted_and_oddly_packed_members_are_told(tiny: World, zips: World, member: str, tmp_path: Path) -> None:
    claim(zips.folder / "hr_dataset.zip", member, flags=1)
    error = refusal(zips.folder, zips.names[0])
    assert (error.reason, "is encrypted" in error.detail) == ("unreadable", True)
    claim(zips.folder / "hr_dataset.zip", member, flags=0, method=zipfile.ZIP_LZMA)
    error = refusal(zips.folder, zips.names[0])
    assert (error.reason, "packed by method 14" in error.detail) == ("unreadable", True)


@pytest.mark.parametrize("form", ["hr_dataset/{aoi}/../../x", "/hr_dataset/{aoi}/x", "hr_dataset\\{aoi}\\x"])
def test_paths_that_climb_out_are_never_read_and_condemn_their_aoi(zips: World, tmp_path: Path, form: str) -> None:
    aoi = zips.names[0]
    with zipfile.ZipFile(zips.folder / "hr_dataset.zip", "a") as archive:
        archive.writestr(form.format(aoi=aoi), b"outside")
    error = refusal(zips.folder, aoi)
    assert error.reason == "unsafe-path"
    assert "hr_dataset.zip holds" in error.detail


@pytest.mark.parametrize("name", ["../x_pan.tiff", "hr_dataset/../x/x_pan.tiff", "C:\\x_pan.tiff", "hr_dataset//x"])
def test_paths_that_climb_out_of_no_aoi_are_reported(zips: World, name: str) -> None:
    with zipfile.ZipFile(zips.folder / "hr_dataset.zip", "a") as archive:
        archive.writestr(name, b"outside")
    source = open_source(zips.folder, "l2a")
    assert source.strays == (f"hr_dataset.zip: {name}",)
    assert len(find_aois(source)) == 6
    assert source.flaws == {}


def test_a_member_listed_twice_is_told(zips: World, member: str) -> None:
    with zipfile.ZipFile(zips.folder / "hr_dataset.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(member, b"another")
    error = refusal(zips.folder, zips.names[0])
    assert error.reason == "listed-twice"
    assert member in error.detail


def flaws(source: Source) -> dict[str, str]:
    return {name: reason for name, (reason, _) in source.flaws.items()}


def test_names_that_differ_only_by_case_or_accents_are_told(spoilt: World) -> None:
    for twin in (spoilt.names[0].upper(), "Lübeck-1", "Lu\N{COMBINING DIAERESIS}beck-1"):
        (spoilt.folder / "hr_dataset" / twin).mkdir()
    source = open_source(spoilt.folder, "l2a")
    twins = {spoilt.names[0], spoilt.names[0].upper(), "Lübeck-1", "Lu\N{COMBINING DIAERESIS}beck-1"}
    assert flaws(source) == dict.fromkeys(twins, "listed-twice")
    assert spoilt.names[0].upper() in source.flaws[spoilt.names[0]][1]


def test_a_folder_whose_name_is_no_utf8_is_told(spoilt: World) -> None:
    os.mkdir(os.fsencode(spoilt.folder / "hr_dataset") + b"/Land\xff")
    assert flaws(open_source(spoilt.folder, "l2a")) == {"Land\\udcff": "unsafe-path"}


def test_an_aoi_of_one_part_is_listed_by_folder_and_zip(spoilt: World, tmp_path: Path) -> None:
    shutil.rmtree(spoilt.folder / "lr_dataset" / spoilt.names[1])
    shutil.rmtree(spoilt.folder / "hr_dataset" / spoilt.names[2])
    names = [aoi.name for aoi in aois_of(spoilt.folder)]
    assert set(names) == set(spoilt.names)
    assert [aoi.name for aoi in aois_of(pack(spoilt.folder, tmp_path / "zips"))] == names


def test_files_beside_the_layout_are_ignored(zips: World, tiny: World) -> None:
    with zipfile.ZipFile(zips.folder / "hr_dataset.zip", "a") as archive:
        for name in (
            "hr_dataset/readme.txt",
            "__MACOSX/hr_dataset/x/x_pan.tiff",
            f"hr_dataset/{tiny.names[0]}/a/b_ps.tiff",
        ):
            archive.writestr(name, b"beside")
    for ours, theirs in zip(aois_of(zips.folder), aois_of(tiny.folder), strict=True):
        same(ours, theirs, THREE)
