"""docker/: the Dockerfiles and compose files hold what the image is promised to be, without an engine to build it."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pipeline_files import ROOT, import_closure, module_file
from ruamel.yaml import YAML

DOCKERFILES = ("docker/Dockerfile", "docker/mlflow/Dockerfile")
COMPOSE = ("docker/compose.yaml", "docker/compose.gpu.yaml", "docker/compose.team.yaml")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|_KEY\b", re.IGNORECASE)
# What a service of ours may not be without; images of others need root while they start.
OURS = ("finetune-mlflow:latest", "${IMAGE:-finetune:latest}")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in read(name).splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def compose(name: str) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(read(name))
    return content


def services() -> list[tuple[str, str, dict[str, Any]]]:
    return [(file, name, service) for file in COMPOSE for name, service in compose(file)["services"].items()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_runs_as_a_user_by_number_and_has_no_secret_argument(name: str) -> None:
    parts = instructions(name)
    # By number: Kubernetes' runAsNonRoot cannot know what a name stands for.
    users = [value for word, value in parts if word == "USER"]
    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[0])
    named = [value for word, value in parts if word in ("ARG", "ENV", "LABEL")]
    assert [value for value in named if SECRET.search(value)] == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_stage_holds_only_what_is_copied_from_a_builder(name: str) -> None:
    stages = [value for word, value in instructions(name) if word == "FROM"]
    assert stages == ["${BASE_IMAGE} AS builder", "${BASE_IMAGE} AS runtime"]
    text = read(name)
    runtime = text[text.index("AS runtime") :]
    assert "pip install" not in runtime
    assert "g++" not in runtime
    # A cache and pip's configuration are mounts of the builder: nothing of them is in a layer.
    assert re.findall(r"--mount=type=(\w+)", text) == ["cache", "secret", "secret"]
    assert "--mount" not in runtime
    assert "apt-get update" not in text or text.count("apt-get update") == text.count("rm -rf /var/lib/apt/lists/*")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_base_without_a_digest_says_why(name: str) -> None:
    (base,) = [value.partition("=")[2] for word, value in instructions(name)[:1] if word == "ARG"]
    assert "@sha256:" in base or re.search(r"^# .*[Dd]igest", read(name), re.MULTILINE), base
    assert ":" in base.rpartition("/")[2]
    assert not base.endswith(":latest")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_labels_name_the_source_and_no_time(name: str) -> None:
    (labels,) = [value for word, value in instructions(name) if word == "LABEL"]
    found = [label.partition("=")[0].removeprefix("org.opencontainers.image.") for label in shlex.split(labels)]
    assert found == ["title", "description", "licenses", "base.name", "version", "revision", "source"]
    version = re.search(r'^version = "(.*)"', read("pyproject.toml"), re.MULTILINE)
    assert version is not None
    assert ("ARG", f"VERSION={version[1]}") in instructions(name)


def test_the_pipelines_image_stops_by_sigint_and_starts_through_the_lock() -> None:
    parts = dict(instructions("docker/Dockerfile"))
    assert parts["STOPSIGNAL"] == "SIGINT"
    assert parts["ENTRYPOINT"] == '["/usr/bin/tini", "-g", "--", "/opt/finetune/entrypoint.sh"]'
    assert parts["CMD"] == '["python", "-m", "finetune.doctor.repro"]'
    # A batch job has no health: a check would start Python beside a training every few seconds.
    assert "HEALTHCHECK" not in parts
    (variables,) = [value for word, value in instructions("docker/Dockerfile") if word == "ENV"]
    names = {variable.partition("=")[0] for variable in shlex.split(variables)}
    # What an unknown UID, DVC's shells, and the NVIDIA toolkit go by.
    assert {"HOME", "USER", "LOGNAME", "SHELL", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"} <= names


def copied(name: str) -> list[str]:
    """The files and folders that a Dockerfile takes from the context."""
    found: list[str] = []
    for word, value in instructions(name):
        if word == "COPY" and "--from=" not in value:
            found += [part for part in value.split() if not part.startswith("--")][:-1]
    return found


def sent(path: str) -> bool:
    """Whether .dockerignore sends a file, by the rules that it uses: the last pattern that fits decides."""
    decision = True
    for line in read(".dockerignore").splitlines():
        pattern = line.removeprefix("!")
        fits = fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/")
        if line and not line.startswith("#") and fits:
            decision = line.startswith("!")
    return decision


def test_what_is_copied_is_sent_and_nothing_else_is() -> None:
    wanted = {path for name in DOCKERFILES for path in copied(name)}
    files = {
        file.relative_to(ROOT).as_posix()
        for path in wanted
        for file in ([ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*"))
        if "__pycache__" not in file.parts and file.is_file()
    }
    assert [path for path in wanted if not (ROOT / path).exists()] == []
    assert {path for path in files if not sent(path)} == set()
    tree = [*ROOT.glob("*"), *(file for top in ("src", "docker", "scripts", "requirements") for file in
            (ROOT / top).rglob("*") if "__pycache__" not in file.parts)]  # fmt: skip
    other = {file.relative_to(ROOT).as_posix() for file in tree if file.is_file()} - files
    extra = {path for path in other if sent(path)}
    # The other pins and scripts are not copied, but harmless.
    assert {path for path in extra if not re.fullmatch(r"requirements/[\w-]+\.txt", path)} == set()


@pytest.mark.parametrize("path", [".env", "src/finetune/.env", "docker/token.txt", ".cache/team.env", "data/raw/x",
                                  ".git/config", "requirements/.pypirc", "scripts/token", "mlflow.db"])  # fmt: skip
def test_what_may_hold_a_secret_is_not_sent(path: str) -> None:
    assert not sent(path)


def test_a_change_of_the_code_does_not_install_everything_again() -> None:
    modules = {path for path in copied("docker/Dockerfile") if path.endswith(".py") and path.startswith("src/")}
    needed = {module_file(name) for name in import_closure("finetune.tools")}
    assert {ROOT / path for path in modules} == needed
    pins = {Path(path).stem for path in copied("docker/Dockerfile") if path.startswith("requirements/")}
    (command,) = [value for word, value in instructions("docker/Dockerfile") if "setup_environment" in value
                  and word == "RUN"]  # fmt: skip
    installed = set(command.partition("--requirements ")[2].partition(" &&")[0].split())
    assert pins == installed | {"build", "lock", "llama-build", "llama-sdist"}


@pytest.mark.parametrize(("file", "name", "service"), services(), ids=lambda value: value if type(value) is str else "")
def test_a_service_is_closed(file: str, name: str, service: dict[str, Any]) -> None:
    for port in service.get("ports", []):
        assert str(port).startswith("127.0.0.1:"), f"{file}: {name} is open to every machine"
    for key in ("privileged", "network_mode", "pid", "ipc", "cap_add"):
        assert key not in service, f"{file}: {name} has {key}"
    if service.get("image") in OURS:
        assert service["cap_drop"] == ["ALL"]
    if "image" in service:
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["image"] in OURS or re.fullmatch(r"[\w/.-]+:\d[\w.-]+", service["image"])
    assert not [mount for mount in service.get("volumes", []) if "docker.sock" in str(mount)]


def test_the_servers_health_is_what_a_client_sees() -> None:
    server = compose("docker/compose.yaml")["services"]["mlflow"]
    # /health answers 200 to a server whose every client gets 403.
    assert server["healthcheck"]["test"] == ["CMD", "python", "/opt/healthcheck.py", "mlflow:5000"]
    hosts = server["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert hosts == ["mlflow", "mlflow:5000", "localhost", "localhost:${MLFLOW_PORT:-5000}", "127.0.0.1",
                     "127.0.0.1:${MLFLOW_PORT:-5000}"]  # fmt: skip
    assert server["volumes"] == ["mlflow:/mlflow"]
    (variables,) = [value for word, value in instructions("docker/mlflow/Dockerfile") if word == "ENV"]
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in shlex.split(variables)
    assert "MLFLOW_BACKEND_STORE_URI=sqlite:////mlflow/mlflow.db" in shlex.split(variables)


def test_the_pipeline_runs_as_the_caller_at_its_own_path_and_has_time_to_stop() -> None:
    service = compose("docker/compose.yaml")["services"]["pipeline"]
    assert service["user"] == "${FINETUNE_UID:-1001}:${FINETUNE_GID:-1001}"
    assert service["volumes"][0] == "${PWD}:${PWD}"
    assert service["working_dir"].startswith("${PWD")
    assert (service["stop_signal"], service["stop_grace_period"]) == ("SIGINT", "5m")
    assert service["depends_on"] == {"mlflow": {"condition": "service_healthy"}}
    assert service["environment"]["FINETUNE_IMAGE"] == "${FINETUNE_IMAGE:-}"
    gpu = compose("docker/compose.gpu.yaml")["services"]["pipeline"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_a_teams_server_starts_with_no_secret_that_anybody_knows() -> None:
    for file, name, service in services():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                # From the caller's environment, and without a default where the server would be open by it.
                assert re.fullmatch(r"\$\{\w+:(\?[^}]+|-)\}", value), f"{file}: {name}: {key}"
    team = compose("docker/compose.team.yaml")["services"]
    required = [key for key, value in team["mlflow"]["environment"].items() if ":?" in value]
    assert required == ["MLFLOW_BACKEND_STORE_URI", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
                        "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD",
                        "MLFLOW_FLASK_SERVER_SECRET_KEY"]  # fmt: skip
    assert team["mlflow"]["command"][-2:] == ["--app-name", "basic-auth"]
    plain = dict(instructions("docker/mlflow/Dockerfile"))["CMD"]
    assert team["mlflow"]["command"][:-2] == YAML(typ="safe", pure=True).load(plain)
    assert [name for name, service in team.items() if "ports" in service] == []


def test_the_servers_image_has_the_pipelines_mlflow() -> None:
    pinned = {line.split()[0] for line in read("requirements/server.txt").splitlines() if "==" in line}
    assert {line for line in pinned if line.startswith("mlflow==")} == {
        line.split()[0] for line in read("requirements/pipeline.txt").splitlines() if line.startswith("mlflow==")
    }
    assert pinned - set(read("requirements/lock.txt").splitlines()) == set()
    assert [line for line in read("requirements/server.txt").splitlines() if "==" in line and "  #" not in line] == []
