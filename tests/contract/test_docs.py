"""The READMEs and the other pages say what is: numbers, commands, stages, messages, names, paths, in both languages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_syntax import fault
from documented_commands import PAGES
from pipeline_files import ROOT, stages
from readme_numbers import BEGIN, END, expected_table
from ruamel.yaml import YAML

READMES = ("README.md", "README.fr.md")
# Keys of params.yaml that begin as tests do.
PARAMETERS = ("test_share",)
# Names that are not a path in this repository: made later, or an example, or a package of Go.
NOT_HERE = (
    ".venv",
    ".tools",
    ".dvc/site",
    ".dvc/cache",
    ".dvc/config.local",
    "owner/name",
    "mlflow.db",
    "dvc_plots",
    ".cache",
    "report",
    "recipes/mine",
    "models/pulled",
    "data/mine",
    "chat_template.jinja",
    "text/template",
)


def named_by_recipes() -> set[str]:
    """What a recipe reads: repositories of the Hub, and files that a user brings."""
    names: set[str] = set()
    for file in ROOT.glob("recipes/*/params.yaml"):
        fetch = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))["fetch"]
        for origin in (fetch["base_model"], *(source["origin"] for source in fetch["sources"])):
            names.add(origin["repo_id"] if "repo_id" in origin else f"{fetch['local_dir']}/{origin.get('files')}")
    return names


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", READMES)
def test_the_table_of_numbers_is_what_was_measured(page: str) -> None:
    shown, wanted = read(page).split(BEGIN)[1].split(END)[0], expected_table(page)
    # A paste may turn the spaces of French typography into plain ones.
    assert [line.split() for line in shown.splitlines()] == [line.split() for line in wanted.splitlines()], (
        f"{page}: put these lines between the two comments:\n{wanted}"
    )


def fences(page: str, language: str) -> str:
    return "\n".join(re.findall(rf"^ *```{language}\n(.*?)^ *```", read(page), re.MULTILINE | re.DOTALL))


def spans(page: str) -> list[str]:
    prose = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]


def commands(page: str) -> list[str]:
    typed = [line.split("  #")[0].strip() for line in fences(page, "sh").splitlines()]
    inline = [span for span in spans(page) if re.match(r"(make|dvc|python|docker|ollama) [^.]", span)]
    return [command for command in [*typed, *inline] if command]


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_are_known(page: str) -> None:
    assert {command: fault(command) for command in commands(page) if fault(command)} == {}


@pytest.mark.parametrize(
    "command",
    [
        "make repo",
        "make setup PYTHN=x",
        "dvc repro train",
        "dvc metrics shw",
        "dvc repro --singel-item fetch",
        "python -m finetune.chatt",
        "python x.py",
        "ollama create a",
    ],
)
def test_an_unknown_command_is_found(command: str) -> None:
    assert fault(command)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what the cheap commands read: no data, no models, a params.yaml of no recipe."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("recipes", ".dvc/config", "dvc.yaml", "params.yaml", "Makefile"):
        action: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        action(ROOT / name, folder / name)
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(text.replace("recipe: smoke", "recipe: other"), encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    ("command", "code", "shown"),
    [
        ("make help", 0, "make repro"),
        ("make --old-file setup recipe NAME=smoke", 0, "params.yaml is now the recipe smoke; next: make repro"),
        ("make --old-file setup recipe NAME=none", 2, "remedy: make recipe NAME=smoke"),
        ("make --old-file setup pin NAME=smoke", 0, "recipes/smoke/params.yaml: 0 of 0 Hub revisions changed"),
        ("make --old-file setup pin NAME=smoke UPDATE=1", 0, "0 of 0 Hub revisions changed"),
        ("make --old-file setup pin NAME=none", 2, "remedy: name a recipe: make pin NAME=smoke"),
        ("make --old-file setup summary", 2, "DataError: no metrics"),
        # Nothing was made in this copy: what counts is that make hands over the Modelfile's path.
        ("make --old-file setup chat", 2, "the Modelfile is missing"),
        ("make --old-file setup serve", 2, "the Modelfile is missing"),
        ("make --old-file setup ollama", 2, "the Modelfile is missing"),
        ("make --old-file setup report", 2, "DataError"),
        ("make --old-file setup lineage FILE=x.gguf", 2, "the GGUF file is missing"),
        ("make --old-file setup gc", 0, ""),
        ("python -m dvc stage list", 0, "ollama_modelfile "),
        ("python -m dvc dag", 0, "| train_qlora |"),
    ],
)
def test_documented_commands_run(copy: Path, command: str, code: int, shown: str) -> None:
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Under `make test` the outer make's flags must not reach the inner one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "DVC_"))}
    environment = {**inherited, "PATH": folders, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    done = subprocess.run(shlex.split(command), cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, shown in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


def prose_numbers(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```|<!-- numbers.*?/numbers -->|`[^`]*`|\]\([^)]*\)", "", read(page), flags=re.M | re.S)
    if page == "README.fr.md":
        text = re.sub(r"(?<=\d),(?=\d)", ".", re.sub(r"(?<=\d)[\u202f\u00a0](?=\d{3})", "", text))
    return sorted(re.findall(r"\d+(?:\.\d+)*", text))


def test_both_readmes_have_the_same_headings_commands_names_and_numbers() -> None:
    english, other = READMES
    levels = [
        re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S), re.M) for page in READMES
    ]
    assert levels[0] == levels[1]
    assert commands(english) == commands(other)
    assert sorted(set(spans(english))) == sorted(set(spans(other)))
    assert prose_numbers(english) == prose_numbers(other)


def outs() -> dict[str, list[str]]:
    entries = {name: stage["outs"] for name, stage in stages().items()}
    return {
        name: [out if isinstance(out, str) else next(iter(out)) for out in listed] for name, listed in entries.items()
    }


def dependencies() -> set[tuple[str, str]]:
    made = [(out, name) for name, listed in outs().items() for out in listed]
    needed = [(dep, name) for name, stage in stages().items() for dep in stage["deps"]]
    return {(before, after) for out, before in made for dep, after in needed if f"{dep}/".startswith(f"{out}/")}


@pytest.mark.parametrize("page", READMES)
def test_the_picture_is_the_pipeline(page: str) -> None:
    picture = fences(page, "mermaid")
    nodes = re.findall(r'(\w+)\["(\w+)<br/>([^"]+)"\]', picture)
    assert [node for node, _, _ in nodes] == [label for _, label, _ in nodes]
    assert sorted(label for _, label, _ in nodes) == sorted(stages())
    assert [(label, out) for _, label, out in nodes if out not in outs()[label]] == []
    chains = [re.findall(r"\w+", re.sub(r'\["[^"]*"\]', "", line)) for line in picture.splitlines() if "-->" in line]
    arrows = {pair for chain in chains for pair in pairwise(chain) if set(pair) <= set(stages())}
    assert len(arrows) == 9
    assert arrows <= dependencies()


def runs_again(section: str) -> set[str]:
    again = {name for name, stage in stages().items() if section in stage["params"]}
    while grown := {after for before, after in dependencies() if before in again} - again:
        again |= grown
    return again


@pytest.mark.parametrize("page", READMES)
def test_the_stages_that_run_again_are_those_of_dvc(page: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", read(page), re.MULTILINE)
    assert len(rows) == 5
    assert [section for section, named in rows if set(re.findall(r"\w+", named)) != runs_again(section)] == []


@pytest.mark.parametrize("page", READMES)
def test_the_messages_that_are_explained_exist(page: str) -> None:
    table = read(page).split("| message |")[1].split("\n\n")[0]
    files = [ROOT / "Makefile", *(ROOT / "scripts").glob("*.py"), *(ROOT / "src").rglob("*.py")]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) >= 8
    assert [message for message in messages if message not in sources] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_paths_and_tests_that_are_named_exist(page: str) -> None:
    made = [*NOT_HERE, *named_by_recipes(), *(out for listed in outs().values() for out in listed)]
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", read(page)) if not ((ROOT / page).parent / link).exists()]
    paths = [span for span in spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|[\w-]+\.(md|yaml|lock|txt|jinja)", span)]
    places = (ROOT, (ROOT / page).parent, ROOT / "src/finetune")
    here = [path for path in paths if not any(f"{path}/".startswith(f"{name}/") for name in made)]
    lost = [path for path in here if not any((place / path).exists() for place in places)]
    proofs = [span for span in spans(page) if span not in PARAMETERS and re.search(r"(^|::)test_\w+$", span)]
    assert [*links, *lost, *(proof for proof in proofs if not has_test(proof))] == []


def anchors(page: str) -> set[str]:
    """The places within a page that a link can name, as GitHub makes them of its headings."""
    plain = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_to_a_heading_name_one(page: str) -> None:
    links = re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", read(page))
    pages = [(Path(os.path.relpath((ROOT / page).parent / (file or Path(page).name), ROOT)), to) for file, to in links]
    assert [(str(file), to) for file, to in pages if to not in anchors(file.as_posix())] == []


def has_test(proof: str) -> bool:
    """Whether a test of this name exists, in the file that is named before `::` if there is one."""
    file, _, name = proof.rpartition("::")
    files = (ROOT / "tests").rglob(Path(file).name or "test_*.py")
    return any(f"def {name}(" in path.read_text(encoding="utf-8") for path in files if path.as_posix().endswith(file))


def test_a_test_that_is_named_with_the_wrong_file_is_found() -> None:
    assert has_test("test_docs.py::has_test")
    assert has_test("tests/contract/test_docs.py::has_test")
    assert not has_test("test_files.py::has_test")
    assert not has_test("tests/unit/test_docs.py::has_test")
    assert not has_test("test_nothing_at_all")
