"""requirements/*.txt -> a bill of materials of the environment (CycloneDX 1.6, JSON); equal locks give equal bytes.

One component for each line of requirements/lock.txt; tools for tests, linters and building are marked as excluded from
the runtime. What torch's own wheel pins (nvidia-*, triton) has no line there, and none here: the SBOM of the image,
which the release builds, lists what lies in it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
NOT_RUNTIME = ("build", "dev")
PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s#]+)(?:.*--hash=sha256:([0-9a-f]{64}))?")


def pins(file: Path) -> list[tuple[str, str, str | None]]:
    """Name as the package index writes it, version, and SHA-256 of the archive where the line has one."""
    found = [PIN.match(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(re.sub(r"[-_.]+", "-", pin[1]).lower(), pin[2], pin[3]) for pin in found if pin]


def component(name: str, version: str, sha256: str | None, scope: ComponentScope) -> Component:
    """A package of the index."""
    address = PackageURL("pypi", name=name, version=version)
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        purl=address,
        bom_ref=str(address),
        scope=scope,
        hashes=hashes,
    )


def bill(requirements: Path, project: dict[str, str]) -> str:
    """The bill of materials of a lock, as JSON text.

    Args:
        requirements: Folder with lock.txt, build.txt, dev.txt and llama-sdist.txt.
        project: name and version, as in pyproject.toml.

    Raises:
        ValueError: The text is not valid CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/).
    """
    tools = {name for file in NOT_RUNTIME for name, _, _ in pins(requirements / f"{file}.txt")}
    hashes = {name: sha256 for name, _, sha256 in pins(requirements / "llama-sdist.txt")}
    root = Component(
        type=ComponentType.APPLICATION,
        name=project["name"],
        version=project["version"],
        bom_ref=project["name"],
    )
    found = [
        component(
            name, version, hashes.get(name), ComponentScope.EXCLUDED if name in tools else ComponentScope.REQUIRED
        )
        for name, version, _ in pins(requirements / "lock.txt")
    ]
    # Of the content, not of the moment.
    serial = uuid5(NAMESPACE_URL, "\n".join(part.bom_ref.value or "" for part in [root, *found]))
    bom = Bom(components=found, serial_number=serial)
    bom.metadata.component = root
    bom.register_dependency(root, found)
    made = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    # The library writes the moment there; it would be the only difference between two bills of one lock.
    del made["metadata"]["timestamp"]
    text = json.dumps(made, indent=1, sort_keys=True) + "\n"
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"not valid CycloneDX: {fault}")
    return text


def main() -> int:
    """Write the bill where the argument says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    text = bill(REQUIREMENTS, tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    count = text.count('"type": "library"')
    sys.stdout.write(f"sbom: {out}, {count} packages of requirements/lock.txt\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
