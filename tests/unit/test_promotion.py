"""`make promote` on a registry: aliases, tags, the page's first line, refusal, rolling back, two at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mirror_runs import make_database, use_database
from promotion_versions import METRICS, NAME, register, without

from finetune.errors import TrackingError
from finetune.tracking import promotion
from finetune.tracking.client import PATIENT, connect
from finetune.tracking.promotion import beside_champion, promote, told

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture
def client(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_database(database, tmp_path, monkeypatch)
    return connect(PATIENT)


def aliases(client: Any) -> dict[str, str]:
    return {name: str(number) for name, number in client.get_registered_model(NAME).aliases.items()}


def tags(client: Any, number: str) -> dict[str, str]:
    found = client.get_model_version(NAME, number).tags
    return {key.removeprefix("promotion."): value for key, value in found.items() if key.startswith("promotion.")}


def page(client: Any, number: str) -> str:
    return str(client.get_model_version(NAME, number).description)


def test_the_first_challenger_becomes_champion_and_its_tags_say_why(client: Any) -> None:
    register(client, 2.0)
    outcome = promote(client, NAME)
    assert (outcome.version, outcome.decision, outcome.replaced) == ("1", "promoted", "")
    assert aliases(client) == {"challenger": "1", "champion": "1"}
    written = tags(client, "1")
    assert written["reasons"].startswith("✓ better: perplexity × 0.8000 of its base (there is no champion yet)")
    assert written["reasons"].count("✓") == 4
    assert {key: written[key] for key in ("decision", "compared_with", "metric", "ratio", "interval")} == {
        "decision": "promoted",
        "compared_with": "base",
        "metric": "perplexity",
        "ratio": "0.800000",
        "interval": "0.700000 to 0.900000",
    }
    assert written["time"].endswith("+00:00")
    assert page(client, "1").startswith("Promoted on 20")
    assert page(client, "1").endswith(" groups of test rows\n\nA page.\n")


def test_a_better_challenger_replaces_the_champion_which_stays_findable(client: Any) -> None:
    for nats in (2.0, 1.9):
        register(client, nats)
        outcome = promote(client, NAME)
    assert aliases(client) == {"challenger": "2", "champion": "2", "previous_champion": "1"}
    assert tags(client, "2")["compared_with"] == "version 1"
    assert tags(client, "2")["ratio"] == "0.904837"
    assert told(NAME, outcome)["roll back"] == "make promote VERSION=finetune-smoke/1"


@pytest.mark.parametrize(("nats", "said"), [(2.0, "not clearly better"), (2.1, "worse: perplexity × 1.1052")])
def test_a_challenger_that_is_not_better_is_refused_and_no_alias_moves(client: Any, nats: float, said: str) -> None:
    register(client, 2.0)
    promote(client, NAME)
    register(client, nats)
    before = aliases(client)
    with pytest.raises(TrackingError) as caught:
        promote(client, NAME)
    assert caught.value.what.startswith(f"version 2 is not promoted, version 1 stays champion:\n  ✗ {said}")
    assert "  ✓ served = trained: 100.00%" in caught.value.what
    assert (caught.value.where, "make repro" in caught.value.remedy) == ("models:/finetune-smoke/2", True)
    assert aliases(client) == before == {"challenger": "2", "champion": "1"}
    assert tags(client, "2")["decision"] == "refused"
    assert said in tags(client, "2")["reasons"]
    assert "was_champion" not in tags(client, "2")
    # Asked again, the line of the page is written anew and not twice.
    with pytest.raises(TrackingError):
        promote(client, NAME)
    assert page(client, "2").startswith("Refused on 20")
    assert f" UTC: {said}" in page(client, "2")
    assert page(client, "2").count("Refused") == 1
    assert page(client, "2").endswith("\n\nA page.\n")


def test_a_version_that_lacks_a_figure_is_refused_by_its_name(client: Any) -> None:
    register(client, 2.0, metrics=without(METRICS, "ollama_modelfile.parity"))
    with pytest.raises(
        TrackingError, match=r"still no champion:\n  ✗ version 1 has no figure ollama_modelfile\.parity"
    ):
        promote(client, NAME)
    assert "champion" not in aliases(client)


def test_a_version_without_a_run_is_refused(client: Any, tmp_path: Path) -> None:
    client.create_registered_model(NAME)
    client.create_model_version(NAME, str(tmp_path))
    with pytest.raises(TrackingError, match=r"version 1 has no figure evaluate\.perplexity_ratio\n"):
        promote(client, NAME, "1")


def test_the_champion_stays_what_it_is(client: Any) -> None:
    register(client, 2.0)
    promote(client, NAME)
    before = tags(client, "1")
    assert promote(client, NAME).decision == promote(client, NAME, "1").decision == "unchanged"
    assert tags(client, "1") == before


def test_a_former_champion_comes_back_by_its_number_only(client: Any) -> None:
    for nats in (2.0, 1.9):
        register(client, nats)
        promote(client, NAME)
    client.set_registered_model_alias(NAME, "challenger", "1")
    with pytest.raises(TrackingError, match="version 1 is not promoted"):
        promote(client, NAME)
    outcome = promote(client, NAME, "1")
    assert (outcome.decision, outcome.replaced) == ("rolled back", "2")
    assert aliases(client) == {"challenger": "1", "champion": "1", "previous_champion": "2"}
    assert tags(client, "1")["compared_with"] == "nothing, in place of version 2"
    assert page(client, "1").split("UTC")[1] == ": in place of version 2\n\nA page.\n"
    # And forward again.
    assert promote(client, NAME, "2").decision == "rolled back"


def test_a_champion_that_was_set_by_hand_can_come_back_too(client: Any) -> None:
    register(client, 2.0)
    client.set_registered_model_alias(NAME, "champion", "1")
    register(client, 1.9)
    promote(client, NAME)
    assert promote(client, NAME, "1").decision == "rolled back"


def test_the_name_that_the_server_knows_is_recorded(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    register(client, 2.0)
    promote(client, NAME)
    assert tags(client, "1")["user"] == "ann"


def test_a_version_that_never_was_champion_cannot_come_in_by_its_number(client: Any) -> None:
    register(client, 2.0)
    promote(client, NAME)
    register(client, 2.1)
    register(client, 1.9)
    with pytest.raises(TrackingError, match="version 2 is not promoted"):
        promote(client, NAME, "2")


def test_a_former_champion_that_is_no_longer_served_as_trained_does_not_come_back(client: Any) -> None:
    for nats in (2.0, 1.9):
        register(client, nats)
        promote(client, NAME)
    client.log_metric(client.get_model_version(NAME, "1").run_id, "ollama_modelfile.parity", 0.5, step=1)
    with pytest.raises(TrackingError, match=r"✗ served = trained: 50\.00%"):
        promote(client, NAME, "1")
    assert aliases(client)["champion"] == "2"


def test_a_champion_that_changes_while_the_challenger_is_judged_is_the_one_it_is_judged_by(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(client, 2.0)
    promote(client, NAME)
    register(client, 1.8)
    register(client, 1.9)
    real, seen = promotion.judge, []

    def judge(new: Any, champion: Any) -> Any:
        seen.append(champion.version)
        if len(seen) == 1:
            # A colleague promotes version 2 in this moment.
            client.set_registered_model_alias(NAME, "champion", "2")
        return real(new, champion)

    monkeypatch.setattr(promotion, "judge", judge)
    with pytest.raises(TrackingError, match=r"version 3 is not promoted, version 2 stays champion:\n  ✗ worse"):
        promote(client, NAME)
    assert (seen, aliases(client)["champion"]) == (["1", "2"], "2")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "finetune.tracking", "promote", "--name", NAME, *arguments]


def test_two_promotions_at_a_time_end_in_one_of_them(client: Any, tmp_path: Path) -> None:
    register(client, 2.0)
    promote(client, NAME)
    for nats in (1.8, 1.9):
        register(client, nats)
    both = [subprocess.Popen(command("--version", number), cwd=tmp_path) for number in ("2", "3")]
    codes = [process.wait(120) for process in both]
    champion = aliases(client)["champion"]
    # Version 3 is refused if version 2 was there before it was judged; version 2 is better than either.
    assert codes[0] == 0
    assert champion in ("2", "3")
    assert tags(client, champion)["decision"] == "promoted"
    assert aliases(client)["previous_champion"] in {"1", "2", "3"} - {champion}


def test_make_promote_says_what_it_did_and_fails_when_it_refuses(client: Any, tmp_path: Path) -> None:
    register(client, 2.0)
    make = ["make", "--no-print-directory", "-C", str(ROOT), "-o", "setup", "promote", f"NAME={NAME}"]
    # Names that other programs give every shell: not for this one.
    environment = {**os.environ, "NAME": "DESKTOP-1", "VERSION": "1.2"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(make, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "champion    finetune-smoke version 1, promoted"
    assert lines[1].startswith("reason 1    ✓ better: perplexity × 0.8000 of its base")
    assert lines[-1] == "pull        make pull NAME=finetune-smoke@champion"
    again = subprocess.run(make, env=environment, capture_output=True, text=True, check=False)
    assert again.stdout == ("champion    finetune-smoke version 1 is the champion already; nothing was changed\n")
    register(client, 2.1)
    refused = subprocess.run(
        [*make, "VERSION=finetune-smoke/2"], env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "TrackingError: version 2 is not promoted, version 1 stays champion" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        (NAME, "", r"the registry has no version finetune-smoke@challenger(.|\n)*make register"),
        (NAME, "9", r"the registry has no version finetune-smoke/9(.|\n)*make register"),
        ("a'b", "", r"a version is name@alias or name/number(.|\n)*make promote VERSION=finetune-smoke/1"),
    ],
)
def test_what_is_not_registered_is_named_with_the_way_to_register_it(
    client: Any, name: str, number: str, said: str
) -> None:
    with pytest.raises(TrackingError, match=said):
        promote(client, name, number)


def test_the_page_of_a_new_version_says_how_it_compares_with_the_champion(client: Any) -> None:
    register(client, 2.0)
    assert beside_champion(client, NAME, "1") == "There was no champion when this version was registered."
    promote(client, NAME)
    assert beside_champion(client, NAME, "1") == "This version is the champion."
    register(client, 1.9)
    register(client, 2.1)
    register(client, 2.0, metrics={})
    other = "of version 1, the champion when this version was registered, 95 % interval"
    assert beside_champion(client, NAME, "2").startswith(f"Better: perplexity × 0.9048 {other}")
    assert beside_champion(client, NAME, "3").startswith(f"Worse: perplexity × 1.1052 {other}")
    assert beside_champion(client, NAME, "4").startswith(f"No clear difference: perplexity × 1.0000 {other}")
