"""make's container targets with a stand-in for docker, the secrets of a team, and the parts of docker/check."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pipeline_files import ROOT

IMAGES = ("pipeline", "mlflow")
MIB = 1 << 20
RESULT = ROOT / "benchmarks/image.json"
# Shows how it was called; `docker image inspect` answers for one image.
DOCKER = """#!/bin/sh
if [ "$1 $2" = "image inspect" ]; then
  [ "$5" = "finetune:latest" ] || exit 1
  echo "sha256:0123"
  exit 0
fi
printf '%s\\n' "$@"
echo "uid=$FINETUNE_UID gid=$FINETUNE_GID image=$FINETUNE_IMAGE name=$IMAGE place=$PWD"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with an address that holds a password, and a `docker` that only shows its arguments."""
    docker = tmp_path / "programs" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    for command in (
        ["git", "init", "--quiet"],
        ["git", "config", "user.name", "test"],
        ["git", "config", "user.email", "test@localhost"],
        ["git", "remote", "add", "origin", "https://ann:hunt/er2@example.org/team/models.git"],
        ["git", "commit", "--quiet", "--allow-empty", "--message", "one"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "finetune"\nversion = "1.2.3"\n')
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "IMAGE"))}
    environment = {**inherited, "PATH": f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "--no-print-directory", "-C", str(folder), "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_make_image_labels_the_commit_and_leaves_the_password_out(folder: Path) -> None:
    done = make(folder, "image", "TORCH=cpu", "BASE_IMAGE=ubuntu:24.04")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert done.returncode == 0, done.stderr
    given = done.stdout.split()
    assert "TORCH=cpu" in given
    assert "BASE_IMAGE=ubuntu:24.04" in given
    assert "VERSION=1.2.3" in given
    assert f"REVISION={commit.strip()}" in given
    assert "SOURCE=https://example.org/team/models.git" in given
    assert not re.search("ann|hunt|er2", done.stdout.replace("docker build", ""))


def test_make_shell_mounts_the_repository_at_its_own_path_as_the_caller(folder: Path) -> None:
    done = make(folder, "shell")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[shown.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert shown[shown.index("--volume") + 1] == f"{folder}:{folder}"
    assert shown[shown.index("--workdir") + 1] == str(folder)
    assert shown[-3:-1] == ["finetune:latest", "bash"]
    assert "--gpus" not in shown
    assert "--gpus" in make(folder, "shell", "GPU=1").stdout.splitlines()


def test_make_repro_docker_gives_the_callers_numbers_and_the_images_id(folder: Path) -> None:
    done = make(folder, "repro-docker", "GPU=1")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[:7] == ["compose", "-f", "docker/compose.yaml", "-f", "docker/compose.gpu.yaml", "run", "--rm"]
    assert shown[7:] == [
        "pipeline",
        f"uid={os.getuid()} gid={os.getgid()} image=sha256:0123 name=finetune:latest place={folder}",
    ]


def test_make_repro_docker_without_the_image_says_how_to_make_it(folder: Path) -> None:
    done = make(folder, "repro-docker", "IMAGE=other:1")
    assert done.returncode == 2
    assert "there is no image other:1\n  remedy: make image" in done.stderr
    assert "compose" not in done.stdout


def test_make_image_check_starts_the_check(folder: Path) -> None:
    python = folder / "programs" / "python3"
    python.write_text('#!/bin/sh\necho "python3 $*"\n')
    python.chmod(0o755)
    done = make(folder, "image-check", "ENGINE=buildah", "PYTHON=python3")
    # The environment of the repository comes first on PATH; this folder has none.
    assert done.stdout == "python3 docker/check/check_image.py --engine buildah\n"


def test_secrets_of_a_team_are_random_readable_by_their_owner_and_never_replaced(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docker/team_env.py")]
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        assert subprocess.run(command, cwd=folder, check=False, umask=0).returncode == 0
    first, second = ((tmp_path / name / ".cache/team.env").read_text() for name in ("a", "b"))
    assert stat.S_IMODE((tmp_path / "a/.cache/team.env").stat().st_mode) == 0o600
    again = subprocess.run(command, cwd=tmp_path / "a", capture_output=True, text=True, check=False)
    assert (again.returncode, "is there" in again.stderr) == (1, True)
    assert (tmp_path / "a/.cache/team.env").read_text() == first
    values = [dict(line.split("=") for line in text.splitlines()) for text in (first, second)]
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker/compose.team.yaml").read_text()))
    assert set(values[0]) == asked
    assert {name for name in asked if values[0][name] == values[1][name]} == {"MLFLOW_AUTH_ADMIN_USERNAME"}
    assert all(re.fullmatch(r"[0-9a-f]{16,64}", value) for value in values[0].values() if value != "admin")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docker/check"))


def layer(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def saved_image(path: Path, layers: list[bytes], config: bytes) -> Path:
    manifest = [{"Config": "config.json", "Layers": [f"{number}.tar" for number in range(len(layers))]}]
    parts = {f"{number}.tar": content for number, content in enumerate(layers)}
    path.write_bytes(layer(**{"manifest.json": json.dumps(manifest).encode(), "config.json": config, **parts}))
    return path


def test_a_token_is_found_in_any_layer_in_the_configuration_and_across_pieces(tmp_path: Path, check: None) -> None:
    from archive import CHUNK_BYTES, holding, read_image

    config = {
        "config": {"Env": ["A=token-of-env"]},
        "history": [
            {"created_by": "/bin/sh -c #(nop) ADD file:" + "0" * 64 + " in / "},
            {"created_by": "ENV A", "empty_layer": True},
            {"created_by": "COPY  /opt/venv /opt/venv # buildkit"},
        ],
    }
    # A tar's header is 512 bytes: the token lies across the end of the first piece that is read.
    deep = layer(big=b"\0" * (CHUNK_BYTES - 512 - 5) + b"token-of-layer", later=b"x")
    image = saved_image(
        tmp_path / "image.tar", [gzip.compress(layer(a=b"token-of-base")), deep], json.dumps(config).encode()
    )
    needles = (b"token-of-base", b"token-of-layer", b"token-of-env", b"nowhere")
    assert list(holding(image, needles).values()) == [["0.tar"], ["1.tar"], ["config.json"], []]
    read, layers = read_image(image)
    assert read == config
    assert layers == [
        {"made_by": "ADD in /", "size_bytes": len(layer(a=b"token-of-base"))},
        {"made_by": "COPY /opt/venv /opt/venv # buildkit", "size_bytes": len(deep)},
    ]


def test_the_planted_files_lie_in_the_context_of_a_check(tmp_path: Path, check: None) -> None:
    from clones import PLANTED, make_context

    make_context(tmp_path / "context", "canary-1")
    found = [name for name in PLANTED if "canary-1" in (tmp_path / "context" / name).read_text()]
    assert found == list(PLANTED)
    assert (tmp_path / "context/docker/Dockerfile").read_bytes() == (ROOT / "docker/Dockerfile").read_bytes()
    assert not (tmp_path / "context/mlflow.db").exists()


@pytest.mark.parametrize("missing", ["buildah", "mmdebstrap"])
def test_without_engine_the_check_says_what_to_install(
    missing: str, tmp_path: Path, check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import CheckError
    from jobs import find_engine

    for name in {"buildah", "mmdebstrap"} - {missing}:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckError, match=f"this needs {missing}\n  remedy: .* apt-get install buildah mmdebstrap"):
        find_engine(tmp_path, "any")
    with pytest.raises(CheckError, match="no Docker daemon answers\n  remedy: start it"):
        find_engine(tmp_path, "docker")


@pytest.fixture
def result() -> dict[str, Any]:
    """What the last `make image-check` wrote."""
    if not RESULT.is_file():
        pytest.skip("no result of the image's check: make image-check, as root or with Docker")
    content: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return content


def test_the_last_check_of_the_image_passed_everywhere(result: dict[str, Any]) -> None:
    assert [name for name, passed in result["checks"].items() if not passed] == []
    assert len(result["checks"]) >= 30
    for image in ("pipeline", "mlflow"):
        assert sum(layer["size_bytes"] for layer in result[image]["layers"]) == result[image]["total_bytes"]


def mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.0f} MiB"


def shown(made_by: str) -> str:
    """The instruction that made a layer, in the words of the page."""
    if "apt-get install" in made_by:
        return "packages of the distribution"
    copied = re.search(r"COPY (?:in )?(?:\S+ )?(/\S+)", made_by)
    return f"`{copied[1].rstrip('/')}`" if copied else made_by


def sizes(image: dict[str, Any]) -> dict[str, int]:
    base, *others = image["layers"]
    return {"base": base["size_bytes"], **{shown(layer["made_by"]): layer["size_bytes"] for layer in others}}


def expected_table(result: dict[str, Any]) -> list[str]:
    """What docs/container.md says of the last check; layers of less than a megabyte are left out."""
    images = [result[name] for name in IMAGES]
    found = [sizes(image) for image in images]
    names = [name for name in dict.fromkeys([*found[0], *found[1]]) if max(size.get(name, 0) for size in found) >= MIB]
    rows = [(name, *(mib(size[name]) if name in size else "" for size in found)) for name in names]
    rows.append(("all layers", *(mib(image["total_bytes"]) for image in images)))
    rows.append(("time to build", *(f"{image['build_s']:.0f} s" for image in images)))
    pipeline = images[0]
    rows.append(
        (
            "smoke pipeline, first and second run",
            f"{pipeline['pipeline_s']:.0f} s, {pipeline['second_run_s']:.0f} s",
            "",
        )
    )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    where = f"{result['engine']}, {result['cores']} cores, {result['processor']}"
    closing = f"{len(result['checks'])} checks, all passed; {result['date']}, {where}."
    return ["| layer | CPU image | MLflow image |", "|---|---|---|", *lines, "", closing]


def test_the_page_says_what_was_measured(result: dict[str, Any]) -> None:
    page = (ROOT / "docs/container.md").read_text(encoding="utf-8")
    wanted = expected_table(result)
    assert page.split("<!-- image -->\n")[1].split("\n<!-- /image -->")[0].splitlines() == wanted, "\n".join(wanted)
