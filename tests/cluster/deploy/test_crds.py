"""Comparison with definitions: small ones of our own in the form of KubeRay's, which are not part of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.deploy.crds import check_documents
from sharding.errors import UserError
from tests.cluster.deploy.examples import WHOLE

DOCUMENT = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}, "spec": {"backoffLimit": 2}}
SPEC = {
    "type": "object",
    "required": ["backoffLimit"],
    "properties": {
        "backoffLimit": {"type": "integer"},
        "free": {"type": "object", "properties": {"a": {}}, "x-kubernetes-preserve-unknown-fields": True},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in ("apiVersion", "kind")},
        "metadata": {"type": "object"},
        "spec": SPEC,
    },
}


def write_definition(folder: Path, kind: str, schema: object) -> None:
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    definition = {"kind": "CustomResourceDefinition", "spec": {"names": {"kind": kind}, "versions": versions}}
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(definition))


def check(folder: Path, **spec: Any) -> None:
    check_documents([yaml.safe_dump({**DOCUMENT, "spec": spec})], folder)


def test_types_required_fields_and_unknown_fields_are_found(tmp_path: Path) -> None:
    write_definition(tmp_path, "RayJob", SCHEMA)
    (tmp_path / "other.yaml").write_text("kind: Kustomization\n")
    check(tmp_path, backoffLimit=2, free={"b": 1})
    for wrong, place in (({"backoffLimit": "2"}, "spec.backoffLimit"), ({}, "spec"), ({"backofLimit": 1}, "spec")):
        with pytest.raises(UserError, match=rf"refuses the RayJob at {place}: "):
            check(tmp_path, **wrong)
    with pytest.raises(UserError, match="'backofLimit' was unexpected"):
        check(tmp_path, backoffLimit=1, backofLimit=1)


def test_other_kinds_are_not_asked_for(tmp_path: Path) -> None:
    check_documents(["apiVersion: v1\nkind: ConfigMap\n"], tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no definition of RayJob v1"),
        ("kind: CustomResourceDefinition", "is no whole definition"),
        ("kind: [", "cannot be read as YAML"),
        ("a: &a [1]\nb: *a", "has YAML aliases"),
        ("\xff\xfe", "has no definition"),
    ],
)
def test_what_is_no_definition_is_refused(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "crd.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        check(tmp_path, backoffLimit=2)


def test_a_definition_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "crd.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="is larger than"):
        check(tmp_path, backoffLimit=2)


def test_a_refusal_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deploy.toml").write_text(WHOLE)
    crds = tmp_path / "crds"
    crds.mkdir()
    write_definition(crds, "RayJob", SCHEMA)
    command = ["cluster", "render", str(tmp_path / "deploy.toml"), "--to", str(tmp_path / "to"), "--crds", str(crds)]
    assert main(command) == 2
    assert f"{crds} refuses the RayJob at spec" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
    assert main([*command[:-1], str(tmp_path / "absent")]) == 2
    assert f"--crds {tmp_path / 'absent'} is no folder" in capsys.readouterr().err
