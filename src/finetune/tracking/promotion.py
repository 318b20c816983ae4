"""models:/NAME@challenger, or a version by number -> the alias champion, if the gate lets it; the reasons as tags."""

from __future__ import annotations

import csv
import getpass
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import TrackingError
from finetune.log import logger
from finetune.tracking.client import FAULTS
from finetune.tracking.gate import Change, Evidence, Verdict, in_words, judge, read_scores, safety
from finetune.tracking.versions import Version, find_version, read_text

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous_champion"
SCORES = "evaluation/test_scores.csv"
EXAMPLE = "make promote, or make promote VERSION=finetune-smoke/1"
# Set once: a version that was champion may come back without being better than the one that followed it.
WAS_CHAMPION = "promotion.was_champion"
MAX_ATTEMPTS = 5
# The line of the last decision, at the top of a version's page.
NOTE = re.compile(r"\A(Promoted|Refused|Rolled back) on \d[^\n]*\n\n")
MAX_NOTE_CHARACTERS = 500


@dataclass(frozen=True)
class Outcome:
    """`decision`: promoted, rolled back, refused or unchanged; `replaced`: the version that was champion, or ""."""

    version: str
    decision: str
    verdict: Verdict
    replaced: str


def promote(client: Any, name: str, number: str = "") -> Outcome:
    """Give version `number` of `name`, else its challenger, the alias champion if the gate lets it.

    A version that was champion before comes back when it is named by its number: then only parity and budgets count.
    The decision and its reasons become tags of the version, also of one that is refused, whose alias never moves.
    Raises TrackingError with every reason when it is refused, and what MLflow raises (see `refusals`).

    MLflow cannot compare and swap: the champion is read again right before the alias moves, and the version judged anew
    if it has changed. Two promotions within those milliseconds leave the later one as champion; both had passed.
    """
    version = find_version(client, f"{name}/{number}" if number else f"{name}@{CHALLENGER}", EXAMPLE)
    for _ in range(MAX_ATTEMPTS):
        champion = version_by_alias(client, name, CHAMPION)
        if champion is not None and champion.number == version.number:
            return Outcome(version.number, "unchanged", Verdict((), None), "")
        outcome = _judge(client, version, champion, returns=bool(number) and WAS_CHAMPION in version.tags)
        if outcome.replaced == _number_of(version_by_alias(client, name, CHAMPION)):
            break
    else:
        what = f"the champion changed {MAX_ATTEMPTS} times while version {version.number} was judged"
        raise TrackingError(what, f"models:/{name}@{CHAMPION}", "make promote")
    _tag(client, version, outcome)
    if outcome.decision == "refused":
        raise _refusal(name, outcome)
    if outcome.replaced:
        # Also one that was made champion by hand.
        client.set_model_version_tag(name, outcome.replaced, WAS_CHAMPION, "true")
        _move_alias(client, name, PREVIOUS, outcome.replaced)
    _move_alias(client, name, CHAMPION, outcome.version)
    now = _number_of(version_by_alias(client, name, CHAMPION))
    if now != outcome.version:
        logger.warning("version %s was promoted in the same moment, and is champion now", now)
    return outcome


def _move_alias(client: Any, name: str, alias: str, number: str) -> None:
    """Set an alias, also where another promotion sets it in the same moment: the database refuses one of the two."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            client.set_registered_model_alias(name, alias, number)
        except FAULTS as fault:
            if attempt == MAX_ATTEMPTS or "unique constraint" not in str(fault).lower():
                raise
        else:
            return


def _judge(client: Any, version: Version, champion: Version | None, *, returns: bool) -> Outcome:
    new, other = read_evidence(client, version), None if champion is None else read_evidence(client, champion)
    verdict = Verdict(tuple(safety(new)), None) if returns else judge(new, other)
    decision = "refused" if not verdict.passed else "rolled back" if returns else "promoted"
    return Outcome(version.number, decision, verdict, _number_of(champion))


def read_evidence(client: Any, version: Version) -> Evidence:
    """What the run of a version recorded; nothing where the version has no run."""
    if not version.run_id:
        return Evidence(version.number, {}, {}, {})
    data = client.get_run(version.run_id).data
    with tempfile.TemporaryDirectory() as folder:
        text = read_text(client, version, SCORES, Path(folder)) or ""
    rows = list(csv.DictReader(text.splitlines()))
    return Evidence(version.number, data.metrics, data.params, read_scores(rows))


def version_by_alias(client: Any, name: str, alias: str) -> Version | None:
    """The version under an alias, or None where the model or the alias does not exist."""
    known = [model for model in client.search_registered_models(f"name = '{name}'") if model.name == name]
    return find_version(client, f"{name}@{alias}", EXAMPLE) if known and alias in known[0].aliases else None


def _number_of(version: Version | None) -> str:
    return "" if version is None else version.number


def promotion_tags(outcome: Outcome, now: datetime, user: str) -> dict[str, str]:
    """What a version says of the last decision about it; a comparison's figures are those of `Change`."""
    change = outcome.verdict.change
    tags = {
        "promotion.decision": outcome.decision,
        "promotion.reasons": "; ".join(f"{'✓' if check.met else '✗'} {check.text}" for check in outcome.verdict.checks),
        "promotion.compared_with": _compared_with(outcome),
        "promotion.time": now.isoformat(timespec="seconds"),
        "promotion.user": user,
        "promotion.metric": change.of if change else "none",
        "promotion.ratio": f"{change.ratio:.6f}" if change else "none",
        "promotion.interval": f"{change.low:.6f} to {change.high:.6f}" if change else "none",
    }
    return tags if outcome.decision == "refused" else {**tags, WAS_CHAMPION: "true"}


def _compared_with(outcome: Outcome) -> str:
    if outcome.decision == "rolled back":
        return f"nothing, in place of version {outcome.replaced}"
    return f"version {outcome.replaced}" if outcome.replaced else "base"


def _tag(client: Any, version: Version, outcome: Outcome) -> None:
    now = datetime.now(UTC)
    for key, value in promotion_tags(outcome, now, _user()).items():
        client.set_model_version_tag(version.model, version.number, key, value)
    page = NOTE.sub("", client.get_model_version(version.model, version.number).description or "")
    client.update_model_version(version.model, version.number, page_note(outcome, now) + page)


def _user() -> str:
    """The name that the server knows, else this machine's; a container's user may have none."""
    with suppress(KeyError, OSError):
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    return "unknown"


def page_note(outcome: Outcome, now: datetime) -> str:
    """The decision in one line, for the top of the version's page; what was not met, or how it compared."""
    told = outcome.verdict.faults or outcome.verdict.checks[:1]
    text = "; ".join(check.text for check in told)
    if outcome.decision == "rolled back":
        text = f"in place of version {outcome.replaced}"
    # Without Markdown: a list of versions shows the signs.
    whole = f"{outcome.decision.capitalize()} on {now:%Y-%m-%d %H:%M} UTC: {text}"
    return f"{whole[:MAX_NOTE_CHARACTERS]}\n\n"


def _refusal(name: str, outcome: Outcome) -> TrackingError:
    faults = outcome.verdict.faults
    stays = f"version {outcome.replaced} stays champion" if outcome.replaced else "there is still no champion"
    what = f"version {outcome.version} is not promoted, {stays}:\n" + "\n".join(f"  ✗ {fault.text}" for fault in faults)
    met = "\n".join(f"  ✓ {check.text}" for check in outcome.verdict.checks if check.met)
    remedies = "\n          ".join(dict.fromkeys(fault.remedy for fault in faults))
    return TrackingError(f"{what}\n{met}" if met else what, f"models:/{name}/{outcome.version}", remedies)


def beside_champion(client: Any, name: str, number: str) -> str:
    """One sentence for the page of a version that was just registered: how it compares with the champion of now."""
    champion = version_by_alias(client, name, CHAMPION)
    if champion is None:
        return "There was no champion when this version was registered."
    if champion.number == number:
        return "This version is the champion."
    version = find_version(client, f"{name}/{number}", EXAMPLE)
    verdict = judge(read_evidence(client, version), read_evidence(client, champion))
    change, other = verdict.change, f"version {champion.number}, the champion when this version was registered"
    if change is not None:
        return f"{_summary(change)}: {in_words(change, other)}."
    return f"Not compared with {other}: {verdict.checks[0].text}."


def _summary(change: Change) -> str:
    return "Better" if change.better else "Worse" if change.low > 1 else "No clear difference"


def told(name: str, outcome: Outcome) -> Mapping[str, str]:
    """The lines that end `make promote`."""
    if outcome.decision == "unchanged":
        return {"champion": f"{name} version {outcome.version} is the champion already; nothing was changed"}
    lines = {"champion": f"{name} version {outcome.version}, {outcome.decision}"}
    lines |= {f"reason {at}": f"✓ {check.text}" for at, check in enumerate(outcome.verdict.checks, 1)}
    lines["pull"] = f"make pull NAME={name}@{CHAMPION}"
    if outcome.replaced:
        lines["roll back"] = f"make promote VERSION={name}/{outcome.replaced}"
    return lines
