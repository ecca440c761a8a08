"""The table of direct dependencies in docs/operations.md, against setup.cfg and constraints.txt."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def direct_dependencies() -> set[str]:
    """Return the names of the packages that setup.cfg asks for, those of extras included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return {match[1] for match in re.finditer(r"^\s*([a-z][a-z0-9-]*)", "\n".join(lines), re.M)}


def test_every_direct_dependency_is_listed_with_its_pinned_version() -> None:
    required = direct_dependencies()
    pinned = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    section = (ROOT / "docs/operations.md").read_text().partition("## Direct dependencies")[2]
    rows = re.findall(r"^\| ([a-z][\w-]*)(?: \(extra `\w+`\))? \| (\S+) \| ([^|]+) \| ([^|]+) \|$", section, re.M)
    listed = {name: version for name, version, _, _ in rows if name != "name"}
    assert listed == {name: pinned[name] for name in required}
    assert all(licence.strip() and reason.strip() for _, _, licence, reason in rows)
