"""`make pin` through the real Hub client, on recipes whose repositories the stand-in of the Hub has."""

from pathlib import Path

import pytest
from hub_server import REVISION, run_program, serving

from finetune.errors import ParamsError
from finetune.params import load_params

OLD, TAGGED = "a" * 40, "1" * 40
SMOKE = Path(__file__).parents[3] / "recipes/smoke/params.yaml"
PROGRAM = """
import os, sys
os.chdir(sys.argv[1])
from finetune.pin import main
sys.exit(main(sys.argv[2:]))
"""
# Every way to write a revision, with comments and spacing that must stay.
LAYOUT = """# A recipe.  # With a note.
recipe: tiny

fetch:
  local_dir:   .          # spaced as its author likes it
  base_model: {{kind: hub, repo_id: team/model, revision: {model}}}   # the base
  sources:
    - name: one
      origin:
        kind: hub
        repo_id: team/data
        revision: {one}  # moves
        files: "*.jsonl"
    - {{name: two, origin: {{kind: hub_stream, revision: {two}, repo_id: team/data, files: été}}}}
    - {{name: local, origin: {{kind: local, files: main}}}}
"""


@pytest.fixture
def hub():
    for state in serving({"datasets/team/data": {"a.jsonl": b"{}\n"}, "team/model": {"config.json": b"{}"}}):
        state.commits = {"main": REVISION, "v1.0": TAGGED, "1.0": TAGGED, "old": OLD}
        yield state


def pin(hub, work, *arguments, **environment):
    return run_program(PROGRAM, [str(work), *arguments], hub, work, **environment)


def written(work, name, **revisions):
    path = work / "recipes" / name / "params.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LAYOUT.format(**revisions).encode())
    return path


def test_branches_and_tags_become_commits_and_every_other_byte_stays(hub, tmp_path):
    path = written(tmp_path, "tiny", model="v1.0", one='"main"', two="'1.0'")
    done = pin(hub, tmp_path, "tiny")
    quoted = f'"{TAGGED}"'  # Digits only: unquoted, YAML would read a number.
    assert path.read_bytes().decode() == LAYOUT.format(model=quoted, one=REVISION, two=quoted)
    assert f"pin: fetch.base_model team/model: v1.0 -> {TAGGED}" in done.stderr
    assert f"pin: fetch.sources.one team/data: main -> {REVISION}" in done.stderr
    assert f"look at it: {hub.url}/datasets/team/data/tree/{REVISION}" in done.stderr
    assert "3 of 3 Hub revisions changed" in done.stderr
    # The pins are written; what else is wrong with this short recipe is said after that.
    assert done.returncode == 1
    assert "clean: Field required" in done.stderr


def test_a_commit_stays_unless_an_update_is_asked_for(hub, tmp_path):
    path = written(tmp_path, "tiny", model=OLD, one=OLD, two=REVISION)
    before = path.read_bytes()
    assert "0 of 3 Hub revisions changed" in pin(hub, tmp_path, "tiny").stderr
    assert (path.read_bytes(), hub.requests) == (before, [])
    done = pin(hub, tmp_path, "tiny", "--update")
    assert f"fetch.sources.one team/data: {OLD} -> {REVISION}" in done.stderr
    assert "2 of 3 Hub revisions changed" in done.stderr
    assert path.read_bytes().decode() == LAYOUT.format(model=REVISION, one=REVISION, two=REVISION)


def test_a_whole_recipe_is_pinned_and_then_valid(hub, tmp_path):
    text = SMOKE.read_text(encoding="utf-8")
    local = "origin: {kind: local, files: chat_fr.chatml}"
    assert local in text
    remote = "origin: {kind: hub, repo_id: team/data, files: chat_fr.chatml, revision: REV}"
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(local, remote.replace("REV", "main")), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"`make pin NAME=<recipe>` .* got 'main'"):
        load_params(path)
    done = pin(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.read_text(encoding="utf-8") == text.replace(local, remote.replace("REV", REVISION))
    assert load_params(path).fetch.sources[0].origin.revision == REVISION


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LAYOUT.format(model="main", one="nowhere", two="neither"), "2 faults:\n  - the repository has no such commit"),
        (LAYOUT.format(model="main", one="nowhere", two="main"), "dataset team/data at nowhere\n"),
        (LAYOUT.format(model="main", one="&a main", two="*a"), "revision is not written in place"),
        ("fetch: {base_model: {kind: scratch}}\n", "no base model and sources to pin: KeyError('sources')"),
        ("fetch: [\n", "not valid YAML"),
    ],
)
def test_a_fault_is_named_and_nothing_is_written(hub, tmp_path, content, what):
    path = tmp_path / "recipes/tiny/params.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode())
    done = pin(hub, tmp_path, "tiny")
    assert done.returncode == 1
    assert what in done.stderr
    assert "remedy: " in done.stderr
    assert path.read_bytes() == content.encode()


def test_an_unknown_recipe_and_a_wish_to_stay_offline_are_errors_with_a_remedy(hub, tmp_path):
    assert "file is missing\n  where:  recipes/none/params.yaml\n" in pin(hub, tmp_path, "none").stderr
    written(tmp_path, "tiny", model="main", one=OLD, two=OLD)
    done = pin(hub, tmp_path, "tiny", HF_HUB_OFFLINE="1")
    assert "offline mode forbids to ask the Hub" in done.stderr
    assert hub.requests == []
