"""The outcome of a rebuild -> tags and one line of the version's page: whether somebody else got the same bytes."""

from __future__ import annotations

import getpass
import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from finetune.lineage import first_line
from finetune.log import logger
from finetune.tracking.client import FAULTS
from finetune.tracking.promotion import NOTE
from finetune.tracking.versions import Version

REBUILT_NOTE = re.compile(r"^Rebuilt on \d[^\n]*\n\n", re.MULTILINE)


def note_rebuild(client: Any, version: Version, told: str, processor: str, *, equal: bool) -> None:
    """Tags `rebuild.*` and a line below that of the last decision; each rebuild replaces what the one before it noted.

    `told`: the outcome in words. Who may only read the registry is warned, since the comparison itself is done.
    """
    now, user = datetime.now(UTC), "unknown"
    # A user without an entry in passwd, as containers have them.
    with suppress(KeyError, OSError):
        user = getpass.getuser()
    tags = {
        "rebuild.equal": str(equal).lower(),
        "rebuild.outcome": told,
        "rebuild.processor": processor,
        "rebuild.time": now.isoformat(timespec="seconds"),
        "rebuild.user": user,
    }
    try:
        for key, value in tags.items():
            client.set_model_version_tag(version.model, version.number, key, value)
        page = client.get_model_version(version.model, version.number).description or ""
        client.update_model_version(version.model, version.number, noted(page, f"{told}, on {processor}", now))
    except FAULTS as fault:
        logger.warning("the registry does not take a note of this rebuild: %s", first_line(fault))


def noted(page: str, text: str, now: datetime) -> str:
    """The description of a version with this line of a rebuild in place of an older one."""
    page = REBUILT_NOTE.sub("", page)
    decision = NOTE.match(page)
    start = decision.end() if decision else 0
    return f"{page[:start]}Rebuilt on {now:%Y-%m-%d %H:%M} UTC: {text}\n\n{page[start:]}"
