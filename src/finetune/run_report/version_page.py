"""RunFacts and a version's number -> the texts of a registry's pages, as Markdown: of a version, and of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.run_report import provenance
from finetune.run_report.card import card_sections, indented, markdown
from finetune.run_report.facts import RunFacts
from finetune.run_report.formats import NO_BREAK
from finetune.run_report.tables import table
from finetune.run_report.verdict import verdicts

# MLflow's column for the description of a version holds 5000 on PostgreSQL (3.17.2, store/model_registry/dbmodels);
# the rest is for the line that `make promote` puts first.
MAX_DESCRIPTION_CHARACTERS = 4400
# The line that names what was left out.
MAX_NOTE_CHARACTERS = 150
# What may be left out for the length of the page, what is missed least first; a section that is not here never is.
LEAST_FIRST = ("merge", "served", "tasks", "quantisation", "sources", "base beside tuned")
MODES = {
    "upload": "The merged model lies in this registry, and MLflow serves it",
    "serving": "MLflow serves this version: it finds its GGUF by SHA-256, in the folder that FINETUNE_MODEL_DIR names",
    "reference": "The files lie in the DVC remote, not in this registry",
}
ALIASES = {
    "challenger": "was registered last, by `make repro` or `make register`",
    "champion": "is in use: `make promote` found it better than the champion before it",
    "previous_champion": "was champion before: `make promote VERSION=` with its name and number brings it back",
}


@dataclass(frozen=True)
class Registered:
    """A version as its page names it: its number, its mode, and how it compares with the champion of that moment."""

    version: str
    mode: str
    beside_champion: str


def describe(facts: RunFacts, model_name: str, registered: Registered) -> str:
    """The card without its head, for a version's page; the longest sections are left out, and named, if it must be.

    It adds what the card cannot know: the version's number, the champion of that moment, and what to type.
    """
    card = card_sections(facts, model_name)
    own = {
        "champion": f"## Beside the champion\n\n{registered.beside_champion}\n",
        "use": _use(model_name, registered),
        "origin": f"## Where it comes from\n\n{markdown(provenance.origin_table(facts))}",
        "rebuild": _rebuild(facts, model_name, registered),
    }
    others = {title: text for title, text in card.items() if title not in ("head", *own)}
    ordered = {"head": _head(facts, card["head"]), **own, **others}
    sections = {title: _spaced(text) for title, text in ordered.items()}
    left_out = _left_out(sections)
    text = "\n".join(text for title, text in sections.items() if title not in left_out)
    note = f"\nLeft out here for their length: {', '.join(left_out)}. The run's report/run.html holds all.\n"
    return text + note if left_out else text


def _left_out(sections: Mapping[str, str]) -> list[str]:
    """The sections without which the rest fits: the least missed first, and one that then fits again comes back."""

    def fits(without: Sequence[str]) -> bool:
        length = sum(len(text) + 1 for title, text in sections.items() if title not in without)
        return length <= MAX_DESCRIPTION_CHARACTERS - (MAX_NOTE_CHARACTERS if without else 0)

    left: list[str] = []
    for title in LEAST_FIRST:
        if not fits(left):
            left.append(title)
    for title in left[::-1]:
        if fits(without := [other for other in left if other != title]):
            left = without
    return left


def describe_model(model_name: str, recipe: str) -> str:
    """The page of a registered model, which lists all its versions: what the aliases mean and what to type."""
    commands = [
        f"make promote NAME={model_name}",
        f"make pull NAME={model_name}@champion",
        f"make lineage VERSION={model_name}@champion",
    ]
    aliases = markdown(table(("alias", "the version that"), ALIASES.items()))
    return (
        f"{model_head(model_name)} is fine-tuned by the recipe `{recipe}`. The page of each version says what it "
        f"learned from, how good it is beside its base and beside the champion, and how to make it again.\n\n"
        f"{_spaced(aliases)}\nIn a clone of the repository: promote the challenger, fetch the champion's files, say "
        f"where they come from.\n\n{indented(commands)}"
    )


def model_head(model_name: str) -> str:
    """How `describe_model` begins: a description that begins otherwise was written by a person, and stays."""
    return f"**{model_name}**"


def _head(facts: RunFacts, head: str) -> str:
    """The card's head with the figure in its first line, which is all that a list of versions shows, for its title."""
    better, lines = verdicts(facts)[0], head.split("\n")[2:]
    rest = "\n".join(line for line in lines if not line.startswith(f"- {better.title}:"))
    return f"{better.figure} perplexity of its base on held-out answers; {better.text}.\n\n{rest}"


def _use(model_name: str, registered: Registered) -> str:
    name = f"{model_name}/{registered.version}"
    served = [f"python -m mlflow models serve -m models:/{name} --env-manager local --port 5001"]
    commands = [f"make pull NAME={name}", *(served if registered.mode != "reference" else [])]
    return (
        f"## Use it\n\n{MODES[registered.mode]} (mode `{registered.mode}`). `make pull` fetches the GGUF and the "
        f"Modelfile, checks their SHA-256 and says how to run them:\n\n{indented(commands)}"
    )


def _rebuild(facts: RunFacts, model_name: str, registered: Registered) -> str:
    commands = provenance.rebuild_commands(facts)
    if not commands:
        return f"## Make it again\n\n{provenance.rebuild_note(facts)}\n"
    return (
        "## Make it again\n\nOne command checks the commit out, reproduces it, and compares the hashes:\n\n"
        f"{indented([f'make rebuild VERSION={model_name}/{registered.version}'])}"
        f"\nThe same by hand, in a clone:\n\n{indented(commands)}"
    )


def _spaced(text: str) -> str:
    """The tables of a text with wider cells, and an empty line below: MLflow draws them without space around."""
    wide = (line.replace(" | ", f"{2 * NO_BREAK} | ") if line.startswith("| ") else line for line in text.split("\n"))
    spaced = "\n".join(wide)
    return f"{spaced}\n{NO_BREAK}\n" if spaced.endswith("|\n") else spaced
