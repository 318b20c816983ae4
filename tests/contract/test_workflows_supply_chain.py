"""The bill of materials and the audit by themselves; tests/pipeline/test_workflow_steps.py runs their workflows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_audit_without_the_network_is_no_clean_bill(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/audit.py"), "--osv-url", "http://127.0.0.1:9/v1/query"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "answered for 0 of" in done.stdout
    assert "nothing is known about the lock now" in done.stdout


def test_the_bill_of_materials_is_the_lock_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([sys.executable, str(ROOT / "scripts/sbom.py"), str(tmp_path / name)], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    bill = json.loads((tmp_path / "one").read_text(encoding="utf-8"))
    components = {component["name"]: component for component in bill["components"]}
    locked = [line for line in (ROOT / "requirements/lock.txt").read_text().splitlines() if "==" in line]
    assert len(components) == len(locked)
    assert components["torch"]["purl"] == "pkg:pypi/torch@2.13.0"
    assert (components["torch"]["scope"], components["pytest"]["scope"]) == ("required", "excluded")
    (archive,) = components["llama-cpp-python"]["hashes"]
    assert archive["content"].startswith("832db069")
