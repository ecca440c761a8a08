"""Comparison of rendered documents with KubeRay's custom resource definitions, in a folder that the user names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from sharding.errors import UserError
from sharding.files import regular_file

# KubeRay's definition of a RayJob has 1.4 MB.
_MAX_BYTES = 16 * 2**20
# libyaml reads such a file in a fraction of a second; PyYAML's own parser takes ten.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_documents(texts: Sequence[str], folder: Path) -> None:
    """Compare the documents of KubeRay's kinds with its definitions: types, required fields, choices, no unknown field.

    Rules in Kubernetes's expression language (``x-kubernetes-validations``) are not evaluated.

    Args:
        texts: YAML texts; documents of other kinds in them are skipped.
        folder: Folder with files such as those of ``helm-chart/kuberay-operator/crds`` of a KubeRay release.

    Raises:
        UserError: A definition is missing or cannot be read, or refuses a document.
    """
    documents = [document for text in texts for document in yaml.safe_load_all(text)]
    ours = [document for document in documents if str(document["apiVersion"]).startswith("ray.io/")]
    schemas = dict(_schemas(folder))
    for document in ours:
        name = (document["kind"], document["apiVersion"].partition("/")[2])
        if name not in schemas:
            raise UserError(f"--crds {folder} has no definition of {' '.join(name)}: give the crds folder of a release")
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schemas[name]).iter_errors(document))
        if error is not None:
            place = ".".join(map(str, error.absolute_path)) or "the document"
            raise UserError(f"{folder} refuses the {name[0]} at {place}: {error.message[:200]}: use another release")


def _schemas(folder: Path) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield the schema of each kind and version that the folder's files define."""
    if not folder.is_dir():
        raise UserError(f"--crds {folder} is no folder: give the crds folder of a KubeRay release")
    for path in sorted(folder.glob("*.yaml")):
        definition = _definition(path)
        if not isinstance(definition, dict) or definition.get("kind") != "CustomResourceDefinition":
            continue
        try:
            kind = definition["spec"]["names"]["kind"]
            for version in definition["spec"]["versions"]:
                yield (kind, version["name"]), _closed(version["schema"]["openAPIV3Schema"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no whole definition ({error!r} is missing): download it again") from None


def _definition(path: Path) -> object:
    try:
        if regular_file("--crds", path) > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES} bytes: it is no definition of KubeRay's")
        text = path.read_text(encoding="utf-8")
        # A few lines of aliases of aliases would grow without bound below; definitions have none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
            raise UserError(f"{path} has YAML aliases: it is no definition of KubeRay's")
        return _LOADER(text).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]}): download it again") from None


def _closed(schema: Any) -> Any:
    """Return the schema with unknown fields forbidden wherever fields are listed, as `kubectl` does."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    listed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if listed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
