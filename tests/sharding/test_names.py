from __future__ import annotations

from pathlib import Path

import pytest

from sharding.errors import UserError
from sharding.names import absolute_uri, expanded, is_text, path_below, refuse_secret, refuse_secrets
from sharding.storage import open_storage

FOLDER = Path("/folder")


@pytest.mark.parametrize("key", ["a", "a/b c.tar", "..a/...", "é/x.2", "a:b"])
def test_a_key_lies_below_its_folder(key: str) -> None:
    assert path_below(FOLDER, key, "here") == FOLDER / key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "..",
        "a/../b",
        "../a",
        "/etc/passwd",
        "a//b",
        "a/",
        "./a",
        "a/./b",
        "a\0b",
        "..\\a",
        "a\nb",
        "\x1b[2J",
        "\x9b",
    ],
)
def test_a_key_that_climbs_or_writes_on_the_screen_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="is no key of s3://bucket/x") as caught:
        path_below(FOLDER, key, "s3://bucket/x")
    assert repr(key) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "s3://KEY:hush@bucket/prefix",
        "s3://KEY:hu/sh@bucket",
        "S3://hush@bucket",
        "s3:/KEY:hush@bucket",
        "https://me:hush@host/x",
        "http://hush@host",
        "https://me:hu/sh@host",
        "gs://me:hush@bucket",
        "https://host/x?X-Amz-Signature=hush",
        "s3://bucket/x?AWSAccessKeyId=hush&Signature=hush",
        "https://host/x?a=1&x-amz-security-token=hush",
        "https://host/x?sv=2024&sig=hush",
        "s3://bucket/x?access_key=hush&secret_key=hush",
        'output.uri="s3://KEY:hush@bucket"',
        "two s3://bucket/x and s3://KEY:hush@bucket",
    ],
)
def test_a_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match="--output holds a user name, password or signature") as caught:
        refuse_secret("--output", text)
    assert "hu" not in str(caught.value)
    for opened in (lambda: open_storage(text), lambda: refuse_secrets(["shard", "--output", text])):
        with pytest.raises(UserError) as caught:
            opened()
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/user@host/x:1",
        "http://head:8265",
        "http://[::1]:8265",
        "https://host/x?download=1",
        "me@host:folder/x",
        "a:b@c",
        "train.learning_rate=3e-4",
        "folder/token=1",
        "file:///data/user@host/ds",
    ],
)
def test_a_text_without_secrets_is_not_refused(text: str) -> None:
    refuse_secret("--output", text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shard", "--output", "s3://K:hush@b"], "the argument after '--output' holds"),
        (["shard", "--output=s3://K:hush@b"], "--output holds"),
        (["train", "x", "output.uri=s3://K:hush@b"], "output.uri holds"),
        (["monitor", "s3://K:hush@b"], "the argument after 'monitor' holds"),
    ],
)
def test_the_option_is_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named}"):
        refuse_secrets(arguments)


def test_one_slash_is_a_mistake_and_tilde_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("s3:/bucket/x", "S3:bucket"):
        with pytest.raises(UserError, match=r"is no S3 URI: write s3://BUCKET/PREFIX"):
            open_storage(uri)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/x").uri == str(tmp_path / "x")
    with pytest.raises(UserError, match="home folder that is not known"):
        expanded("~nobody-of-that-name/x")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///data/set", "/data/set"),
        ("FILE://localhost/data/set", "/data/set"),
        ("file:///data/a%20b%23", "/data/a b#"),
        ("~/x", "/home/me/x"),
        ("data", "/here/data"),
    ],
)
def test_a_file_uri_is_a_local_path(uri: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_uri(uri, Path("/here")) == path
    if uri != "data":
        assert open_storage(uri).uri == path


@pytest.mark.parametrize(
    "uri", ["file:data", "file:/data", "file://host/data", "file:///data?x", "file:///data#x", "file://"]
)
def test_a_file_uri_without_a_path_of_this_machine_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="write file:///FOLDER"):
        open_storage(uri)


def test_other_uris_stay_as_they_are() -> None:
    assert absolute_uri("s3://bucket/x", Path("/here")) == "s3://bucket/x"


@pytest.mark.parametrize(
    ("name", "expected"), [("é\U0001f600", True), ("", True), ("caf\udce9", False), ("\ud800", False)]
)
def test_a_name_that_is_no_unicode_is_no_text(name: str, expected: bool) -> None:
    assert is_text(name) is expected
