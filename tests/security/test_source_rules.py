"""What the code of this repository never does, whatever a test runs: read as syntax, rule by rule."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for folder in ("src", "scripts", "docker", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
ASKS = "asks at the terminal whether to run code of the repository"
# Formats that run code when they are read; PyYAML, whose plain load does.
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "imp"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "tempfile.mktemp"}
# Keyword -> the value that it may have, where it is given at all.
KEYWORDS = {
    **{name: True for name in ("weights_only", "verify", "autoescape")},
    **{name: False for name in ("shell", "trust_remote_code", "allow_pickle")},
}
LOADERS = re.compile(r"Auto\w+\.from_(pretrained|config)")
# A host without a dot is an example in a message.
HOSTS = re.compile(r"http://(?!127\.0\.0\.1)[\w-]+\.\w|0\.0\.0\.0|\[::\]")


def faults(source: str) -> Iterator[str]:
    """The rules that a file breaks, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {fault}" for fault in call_faults(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and HOSTS.search(node.value):
            yield f"{node.lineno}: {node.value.strip()[:60]!r}"


def call_faults(call: ast.Call) -> Iterator[str]:
    name, given = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    if name in CALLS and not (name == "torch.load" and "weights_only" in given):
        yield name
    for keyword, allowed in KEYWORDS.items():
        value = given.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is allowed):
            yield f"{name}: {keyword}={ast.unparse(value)}"
    if LOADERS.fullmatch(name) and "trust_remote_code" not in given:
        yield f"{name} without trust_remote_code=False: {ASKS}"
    if name == "YAML" and ast.unparse(given.get("typ", ast.Constant("rt"))) not in ("'safe'", "'rt'"):
        yield f"YAML of another kind: {ast.unparse(call)}"
    if name.endswith(".extractall") and ast.unparse(given.get("filter", ast.Constant(None))) != "'data'":
        yield f"{name} without filter='data'"
    if name == "Environment" and "autoescape" not in given:
        yield "a Jinja environment that is neither sandboxed nor escapes"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_the_code_keeps_the_rules(file: Path) -> None:
    found = faults(file.read_text(encoding="utf-8"))
    # Benchmarks load what they have made themselves, and a container is reached by the ports that compose publishes.
    allowed = {"benchmarks": ASKS, "docker": "'0.0.0.0'"}.get(file.relative_to(ROOT).parts[0], "nothing")
    assert [fault for fault in found if not fault.endswith(allowed)] == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "import pickle"),
        ("from yaml import safe_load", "import yaml"),
        ("torch.load(f)", "torch.load"),
        ("torch.load(f, weights_only=False)", "weights_only=False"),
        ("torch.load(f, weights_only=flag)", "weights_only=flag"),
        ("AutoConfig.from_pretrained(x)", "without trust_remote_code=False"),
        ("AutoModel.from_config(x, trust_remote_code=True)", "trust_remote_code=True"),
        ("eval(x)", "eval"),
        ("subprocess.run('x', shell=True)", "shell=True"),
        ("YAML(typ='unsafe')", "YAML of another kind"),
        ("tar.extractall(x)", "without filter='data'"),
        ("Environment(loader=x)", "neither sandboxed nor escapes"),
        ("np.load(x, allow_pickle=True)", "allow_pickle=True"),
        ("x = 'http://example.org'", "'http://example.org'"),
        ("serve(host='0.0.0.0')", "'0.0.0.0'"),
    ],
)
def test_a_broken_rule_is_found(source: str, fault: str) -> None:
    assert any(fault in found for found in faults(source))


def test_what_is_allowed_is_not_found() -> None:
    allowed = "torch.load(f, weights_only=True)\nYAML(typ='safe')\nYAML()\nx = f'http://{host}/v1'\nmodel.eval()\n"
    assert list(faults(allowed)) == []
