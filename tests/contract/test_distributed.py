"""The files of distributed/ say what schedulers and this program understand, and start nodes and workers right."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pipeline_files import ROOT
from ruamel.yaml import YAML

from finetune.errors import StoppedError

FOLDER = ROOT / "distributed"
SLURM = sorted(FOLDER.glob("slurm/*.sbatch"))
KUBERNETES = sorted(FOLDER.glob("kubernetes/*.yaml"))
SKYPILOT = sorted(FOLDER.glob("skypilot/*.yaml"))
# The oldest one whose Job has all that is used, and the newest whose schema is there.
KUBERNETES_VERSIONS = ("1.31", "1.37")
LIMIT_S = 120
# A pipeline without a training, so that nodes only meet.
PIPELINE = "stages: {given: {cmd: cp given made, deps: [given], outs: [made]}}"
# What Slurm's own programs do, as far as train.sbatch asks for it: as many tasks as there are, each with its number.
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID="$task" "$@" & tasks+=("$!"); done
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = (
    '#!/bin/bash\necho "scontrol $*" >> scontrol.txt\n[ "$1" = show ] && printf "127.0.0.1\\n127.0.0.2\\n"\nexit 0\n'
)
RECORDER = '#!/bin/bash\necho "$FINETUNE_WORKERS $*"\n'


def documents(path: Path) -> list[dict[str, Any]]:
    return list(YAML(typ="safe", pure=True).load_all(path.read_text(encoding="utf-8")))


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(path) if document["kind"] == kind]
    return found


def container(path: Path) -> dict[str, Any]:
    (found,) = of_kind(path, "Job")["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("file", SLURM, ids=lambda file: file.name)
def test_slurm_scripts_pass_shellcheck(file: Path) -> None:
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    done = subprocess.run(["shellcheck", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_manifests_fit_the_schema_of_kubernetes(file: Path, version: str) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate (requirements/dev.txt)"
    )
    for document in documents(file):
        validator.validate(document, version, strict=True)
    spoilt = of_kind(file, "Job")
    spoilt["spec"]["completionModus"] = "Indexed"
    with pytest.raises(validator.ValidationError):
        validator.validate(spoilt, version, strict=True)


@pytest.mark.parametrize("file", SKYPILOT, ids=lambda file: file.name)
def test_tasks_fit_the_schema_of_skypilot(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip(
        "sky", reason="pip install skypilot==0.14.1, in an environment of its own (docs/scale.md)"
    )
    assert sky.Task.from_yaml(str(file)).num_nodes == documents(file)[0]["num_nodes"]


def test_the_job_of_kubernetes_agrees_with_itself() -> None:
    file = FOLDER / "kubernetes/train.yaml"
    job, service = of_kind(file, "Job"), of_kind(file, "Service")
    pod = job["spec"]["template"]
    environment = {entry["name"]: entry.get("value") for entry in container(file)["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["FINETUNE_NODES"])
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(environment["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == labels
    policy = of_kind(file, "NetworkPolicy")["spec"]
    assert (
        policy["podSelector"]["matchLabels"] == policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"] == labels
    )


def test_a_stopped_node_is_started_again_by_every_scheduler() -> None:
    job = of_kind(FOLDER / "kubernetes/train.yaml", "Job")["spec"]
    (rule,) = [rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rule["action"] == "Ignore"
    assert rule["onExitCodes"] == {"containerName": "finetune", "operator": "In", "values": [StoppedError.exit_code]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"
    task = documents(FOLDER / "skypilot/train.yaml")[0]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [StoppedError.exit_code]
    assert '"$code" = 75' in (FOLDER / "slurm/train.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_pods_have_no_rights_that_they_do_not_need(file: Path) -> None:
    pod = of_kind(file, "Job")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert container(file)["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def program(folder: Path, name: str, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    (folder / name).chmod(0o755)


def environment(folder: Path, programs: Path | None = None, **variables: str) -> dict[str, str]:
    """This environment without what an outer run has set; `programs` come first on the path."""
    outer = ("DVC_", "MLFLOW_", "MAKE", "FINETUNE_", "MASTER_", "SLURM_", "SKYPILOT_", "JOB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    path = [str(programs)] if programs else []
    path += [str(Path(sys.executable).parent), os.environ["PATH"]]
    given = {"PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT / "src"), "DVC_NO_ANALYTICS": "1"}
    return {**kept, **given, **variables}


@pytest.fixture
def meeting(tmp_path: Path) -> Path:
    """A repository whose parameters want two processes, and whose pipeline trains nothing."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, env=environment(folder), check=True)
    with (folder / ".dvc/config").open("a", encoding="utf-8") as config:
        config.write("[core]\n    site_cache_dir = .dvc/site\n")
    text = (ROOT / "recipes/smoke/params.yaml").read_text(encoding="utf-8")
    two = "distribution: {strategy: ddp, processes: 2}"
    params, changed = re.subn(r"distribution: \{strategy: single, processes: 1\}", two, text)
    params, rows = re.subn(r"(?m)^  batch_rows: 1$", "  batch_rows: 2", params)
    assert (changed, rows) == (1, 1)
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    (folder / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (folder / "given").write_text("given", encoding="utf-8")
    (folder / "requirements").mkdir()
    shutil.copy(ROOT / "requirements/train.txt", folder / "requirements")
    return folder


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def nodes_of_kubernetes(folder: Path) -> list[subprocess.Popen[str]]:
    """The pods of train.yaml as processes here, without the init process of a container."""
    file = FOLDER / "kubernetes/train.yaml"
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": str(ROOT / "src")}
    here |= {"DVC_SITE_CACHE_DIR": str(folder / ".dvc/site")}
    started = []
    for index in range(of_kind(file, "Job")["spec"]["completions"]):
        variables = {}
        for entry in container(file)["env"]:
            field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            assert field in (None, "metadata.annotations['batch.kubernetes.io/job-completion-index']")
            variables[entry["name"]] = entry["value"] if field is None else str(index)
        command = container(file)["command"]
        assert command[:2] == ["tini", "--"]
        started.append(start(command[2:], folder, environment(folder, **{**variables, **here})))
    return started


def nodes_of_skypilot(folder: Path) -> list[subprocess.Popen[str]]:
    """The nodes of train.yaml as processes here."""
    task = documents(FOLDER / "skypilot/train.yaml")[0]
    run = (
        task["run"].replace("cd /repository", f"cd {folder}").replace("MASTER_PORT=29400", f"MASTER_PORT={free_port()}")
    )
    shared = {"SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    ranks = [{**shared, "SKYPILOT_NODE_RANK": str(rank)} for rank in range(task["num_nodes"])]
    return [start(["bash", "-c", run], folder, environment(folder, **rank)) for rank in ranks]


def nodes_of_slurm(folder: Path) -> list[subprocess.Popen[str]]:
    """The job of train.sbatch, whose tasks a stand-in for srun starts here."""
    programs = folder.parent / "programs"
    program(programs, "srun", SRUN)
    program(programs, "scontrol", SCONTROL)
    numbers = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid() % 5000), "SLURM_JOB_NODELIST": "n[0-1]"}
    command = ["bash", str(FOLDER / "slurm/train.sbatch")]
    return [start(command, folder, environment(folder, programs, **numbers))]


def start(command: list[str], folder: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=dict(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("nodes_of", [nodes_of_slurm, nodes_of_kubernetes, nodes_of_skypilot])
def test_nodes_meet_as_the_files_start_them_and_dvc_runs_on_one(meeting: Path, nodes_of: Any) -> None:
    started = nodes_of(meeting)
    shown = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), shown
    text = "".join(shown)
    assert text.count("node 1 is there") == text.count("node 1 of 2 waits for a training of node 0") == 1
    assert text.count("Running stage 'given'") == 1
    assert (meeting / "made").read_text(encoding="utf-8") == "given"


@pytest.mark.parametrize(("code", "queued"), [(75, True), (1, False), (0, False)])
def test_slurm_queues_a_stopped_job_again_and_no_other(tmp_path: Path, code: int, queued: bool) -> None:
    programs = tmp_path / "programs"
    program(programs, "srun", f"#!/bin/bash\nexit {code}\n")
    program(programs, "scontrol", SCONTROL)
    numbers = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]"}
    command = ["bash", str(FOLDER / "slurm/train.sbatch")]
    variables = environment(tmp_path, programs, **numbers)
    assert subprocess.run(command, cwd=tmp_path, env=variables, check=False).returncode == code
    asked = (tmp_path / "scontrol.txt").read_text(encoding="utf-8")
    assert ("scontrol requeue 7" in asked) is queued


def shard_commands(scheduler: str, folder: Path) -> list[str]:
    """What the second, and the last, worker of a scheduler's file calls Python with."""
    programs = folder / "programs"
    program(programs, "python", RECORDER)
    # The file's own `.venv` comes first on its path.
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(programs)
    if scheduler == "slurm":
        count, command = 16, ["bash", str(FOLDER / "slurm/shards.sbatch"), "clean"]
        numbers = [{"SLURM_ARRAY_TASK_ID": str(at), "SLURM_ARRAY_TASK_COUNT": "16"} for at in (2, count)]
        shared = {"SLURM_CPUS_PER_TASK": "8"}
    elif scheduler == "kubernetes":
        file = FOLDER / "kubernetes/shards.yaml"
        count = of_kind(file, "Job")["spec"]["completions"]
        assert count == of_kind(file, "Job")["spec"]["parallelism"]
        command = [*container(file)["command"][2:], *container(file)["args"]]
        shared = {entry["name"]: entry["value"] for entry in container(file)["env"]}
        numbers = [{"JOB_COMPLETION_INDEX": str(at)} for at in (1, count - 1)]
    else:
        task = documents(FOLDER / "skypilot/shards.yaml")[0]
        count, shared = task["num_nodes"], {**task["envs"], "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
        command = ["bash", "-c", task["run"].replace("cd /repository", f"cd {folder}")]
        numbers = [{"SKYPILOT_NODE_RANK": str(at)} for at in (1, count - 1)]
    assert count == 16
    done = [
        subprocess.run(
            command,
            cwd=folder,
            env=environment(folder, programs, **shared, **own),
            capture_output=True,
            text=True,
            check=True,
        )
        for own in numbers
    ]
    return [each.stdout.strip() for each in done]


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes", "skypilot"])
def test_workers_have_each_a_shard_of_their_own(tmp_path: Path, scheduler: str) -> None:
    workers = "" if scheduler == "skypilot" else "8"
    assert shard_commands(scheduler, tmp_path) == [
        f"{workers} -m finetune.shard clean --shard 2/16".strip(),
        f"{workers} -m finetune.shard clean --shard 16/16".strip(),
    ]
