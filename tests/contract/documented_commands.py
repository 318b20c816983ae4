"""The pages -> the commands that they show, and the register of the tests that run each of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline_files import ROOT

PAGES = tuple(
    sorted(
        file.relative_to(ROOT).as_posix()
        for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.md", "distributed/**/*.md")
        for file in ROOT.glob(pattern)
        if file.name != "CHANGELOG.md"
    )
)
# What a sentence above a block says of commands that cannot run wherever the tests do.
MARKED = re.compile(
    r"\bneeds? (Docker|a GPU|several GPUs|Ollama|Slurm|Kubernetes|SkyPilot|the network)\b"
    r"|\b(demandent?|nécessitent?|exigent?|veut|veulent) (Docker|un GPU|Ollama)\b",
    re.IGNORECASE,
)
HERE, IN_A_COPY = "test_commands_run_as_they_are_shown", "test_documented_commands_run"
MINIATURE = "test_recipe_ends_with_a_modelfile_and_a_registered_version"
SECRETS = "test_no_secret_is_in_anything_that_a_run_wrote_or_printed"
LISTENING = "test_make_starts_its_servers_on_this_machine_only"
REMOTES = "test_a_server_with_ssh"
# How a command begins -> the test that runs it; its file, or a helper beside it, names what the command runs.
PROOFS = {
    "make help": IN_A_COPY,
    "make setup": "test_a_step_runs_once_per_key_and_again_when_its_product_is_gone",
    "make clean-tools": "test_the_cpu_choice_is_not_met_by_a_cuda_build",
    "make doctor": "test_doctor_of_a_fresh_clone_finds_no_fault",
    "make repro": "test_the_committed_bytes_come_out_again",
    "make register": "test_registering_twice_makes_one_version_under_the_alias",
    "make recipe": MINIATURE,
    "make pin": MINIATURE,
    "make summary": SECRETS,
    "make report": SECRETS,
    "make plots": "test_plots_are_drawn",
    "make lineage": "test_lineage_of_a_copied_file_names_the_commit_and_the_commands",
    "make chat": IN_A_COPY,
    "make serve": LISTENING,
    "make ollama": IN_A_COPY,
    "make mlflow": LISTENING,
    "make test": "test_the_tests_exit_code_survives_the_pipe_and_their_last_lines_are_shown",
    "make lint": "test_make_lint_runs_each_of_them",
    "make gpu-test": "test_every_make_target_of_a_workflow_exists",
    "make lock-check": ("test_the_lock_check_needs_no_data_and_names_the_stage_that_a_changed_parameter_makes_stale"),
    "make audit": "test_the_audit_asks_for_every_locked_package_and_names_the_planted_fault",
    "make sbom": "test_the_bill_of_materials_is_the_lock_and_the_same_bytes_each_time",
    "make image": "test_make_image_labels_the_commit_and_leaves_the_password_out",
    "make image-check": "test_make_image_check_starts_the_check",
    "make shell": "test_make_shell_mounts_the_repository_at_its_own_path_as_the_caller",
    "make repro-docker": "test_make_repro_docker_gives_the_callers_numbers_and_the_images_id",
    "make promote": "test_make_promote_says_what_it_did_and_fails_when_it_refuses",
    "make pull": "test_a_version_comes_whole_verified_and_ready_to_serve",
    "make push": REMOTES,
    "make rebuild": "test_equal_bytes_are_shown_out_by_out_and_nothing_of_the_users_is_touched",
    "make gc": IN_A_COPY,
    "dvc repro --single-item": HERE,
    "dvc repro": "test_an_evaluate_parameter_leaves_training_alone",
    "dvc stage list": HERE,
    "dvc dag": HERE,
    "dvc metrics diff": HERE,
    "dvc cache dir": HERE,
    "dvc config": HERE,
    "dvc exp": "test_the_commands_of_the_page_on_experiments",
    "dvc plots diff": "test_the_commands_of_the_page_on_experiments",
    "dvc remote": REMOTES,
    "cp -r": HERE,
    "python -c": HERE,
    "python scripts/run_workflow.py": "test_the_documented_command_runs_a_job_and_says_what_became_of_its_steps",
    "python docker/team_env.py": ("test_secrets_of_a_team_are_random_readable_by_their_owner_and_never_replaced"),
    "python -m finetune.doctor.repro": "test_a_stop_waits_for_the_stage_to_save_and_leaves_nothing",
    "python -m finetune.tracking": "test_the_registered_version_answers",
    "python -m mlflow models serve": "test_the_version_answers_over_http_as_the_merged_model_does",
}
# Settings of the shell that a person types them in.
SHELL = (". .venv/bin/activate", "export ", "unset ", "cd ")
PROVEN_BY = {begin.split()[1]: test for begin, test in PROOFS.items() if begin.startswith("make ")}


@dataclass(frozen=True)
class Block:
    """One ```sh block: the paragraph above it, and its commands without comments."""

    above: str
    commands: tuple[str, ...]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    fence = re.compile(r"^( *)```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for found in fence.finditer(text):
        paragraphs = [part for part in text[: found.start()].rstrip().split("\n\n") if part.strip()]
        joined = found[2].replace("\\\n", " ")
        lines = [line.split("  #")[0].split(" # ")[0].strip() for line in joined.splitlines()]
        yield Block(paragraphs[-1] if paragraphs else "", tuple(line for line in lines if line and line[0] != "#"))


def lacking(command: str, above: str) -> str | None:
    """What a command lacks: a mark, a test in the sentence above it, or one in the register; None if it has one."""
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    typed = " ".join(words)
    if not words or MARKED.search(above) or f"{typed} ".startswith(SHELL):
        return None
    named = [test for test in re.findall(r"`((?:tests/[\w/.]+\.py::)?test_\w+)`", above) if names(test, typed)]
    if named:
        return None
    begin = max((begin for begin in PROOFS if f"{typed} ".startswith(f"{begin} ")), key=len, default=None)
    if begin is None:
        return "no test runs it: name one above it or in PROOFS, or say what it needs"
    return None if names(PROOFS[begin], begin) else f"{PROOFS[begin]} does not run it"


def names(test: str, command: str) -> bool:
    """Whether a test exists, and its file names what the command runs: a target, a module, or its last plain word."""
    path, _, function = test.rpartition("::") if "::" in test or not test.endswith(".py") else (test, "", "")
    files = [ROOT / path] if path else [*(ROOT / "tests").rglob("test_*.py")]
    for file in files:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        # A test's helpers lie beside it.
        beside = "".join(each.read_text(encoding="utf-8") for each in file.parent.glob("*.py") if each != file)
        if text and f"def {function}(" in text + ("" if function else "def (") and run_word(command) in text + beside:
            return True
    return False


def run_word(command: str) -> str:
    """The word by which a test that runs a command is known: a target, a module, a subcommand, or the program."""
    words = command.split()
    if words[0] == "make":
        return next(word for word in words[1:] if not word.startswith("-"))
    if words[:2] == ["python", "-m"]:
        return words[2]
    return words[1] if words[0] in ("dvc", "python") else words[0]
