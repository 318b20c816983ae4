"""metrics/*.json, benchmarks/pipeline_cost.json -> the lines of the table of numbers, as each README shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline_files import ROOT

BEGIN, END = "<!-- numbers -->\n", "<!-- /numbers -->"
MIB, NARROW_SPACE = 1 << 20, "\u202f"
TABLE = {
    "README.md": """\
| measured | value | from |
|---|---|---|
| rows read = kept + dropped by a rule + duplicates + quarantined | {rows} = {kept} + {dropped} + {twice} + {held} | C |
| perplexity of held-out answers ({tokens} tokens), base → tuned | {base} → {tuned} (× {ratio}) | E |
| next token right, base → tuned | {base_right}% → {tuned_right}% | E |
| merged model beside base + adapter | largest logit difference {difference} | M |
| GGUF {type} | {size} MiB, perplexity × {loss} of merged, same first choice {same}% | Q |
| prompts served as trained | {alike} of {chats} chats | O |
| the whole pipeline, after set-up | {wall} s on {cores} cores, largest process {peak} GiB | B |
""",
    "README.fr.md": """\
| mesure | valeur | source |
|---|---|---|
| lignes lues = gardées + écartées par une règle + doublons + quarantaine | \
{rows} = {kept} + {dropped} + {twice} + {held} | C |
| perplexité des réponses de test ({tokens}\xa0tokens), base → affiné | {base} → {tuned} (× {ratio}) | E |
| token suivant juste, base → affiné | {base_right}\xa0% → {tuned_right}\xa0% | E |
| modèle fusionné face à base + adaptateur | écart de logits maximal {difference} | M |
| GGUF {type} | {size}\xa0Mio, perplexité × {loss} du fusionné, même premier choix {same}\xa0% | Q |
| prompts servis comme à l’entraînement | {alike} conversations sur {chats} | O |
| tout le pipeline, installation exceptée | {wall}\xa0s sur {cores}\xa0cœurs, plus gros processus {peak}\xa0Gio | B |
""",
}
SOURCES = {"C": "clean", "E": "evaluate", "M": "merge", "Q": "quantize_gguf", "O": "ollama_modelfile"}


def loaded(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def figures() -> dict[str, str]:
    clean, evaluated, served = (loaded(f"metrics/{name}.json") for name in ("clean", "evaluate", "ollama_modelfile"))
    cost = loaded("benchmarks/pipeline_cost.json")
    base, tuned = evaluated["base"], evaluated["tuned"]
    return {
        **{"rows": f"{clean['rows_in']:,}", "kept": f"{clean['kept']:,}", "twice": f"{clean['duplicates']:,}"},
        **{"dropped": f"{sum(clean['dropped'].values()):,}", "held": f"{sum(clean['quarantined'].values()):,}"},
        **{"base": f"{base['perplexity']:.2f}", "tuned": f"{tuned['perplexity']:.2f}", "tokens": f"{base['tokens']:,}"},
        **{"base_right": f"{base['token_accuracy']:.1%}"[:-1], "tuned_right": f"{tuned['token_accuracy']:.1%}"[:-1]},
        "ratio": f"{evaluated['perplexity_ratio']:.3f}",
        "difference": f"{loaded('metrics/merge.json')['max_logit_difference']:.4f}",
        "chats": f"{served['chats']:,}",
        "alike": f"{round(served['parity'] * served['chats']):,}",
        **{"wall": f"{cost['wall_s']:.0f}", "cores": f"{cost['cores']}", "peak": f"{cost['peak_rss_gib']:.2f}"},
    }


def figures_by_type() -> Iterator[dict[str, str]]:
    types = loaded("metrics/quantize_gguf.json")["types"]
    for name, entry in sorted(types.items(), key=lambda item: -item[1]["size_bytes"]):
        size, same = f"{entry['size_bytes'] / MIB:.2f}", f"{entry['top1_agreement']:.1%}"[:-1]
        yield {"type": f"`{name}`", "size": size, "loss": f"{entry['perplexity_ratio']:.4f}", "same": same}


def expected_table(page: str) -> str:
    once, lines = figures(), []
    for line in TABLE[page].splitlines():
        head, _, source = line.removesuffix(" |").rpartition(" ")
        if source in {*SOURCES, "B"}:
            file = f"metrics/{SOURCES[source]}.json" if source in SOURCES else "benchmarks/pipeline_cost.json"
            line = f"{head} `{file}` |"
        for values in list(figures_by_type()) if "{type}" in line else [once]:
            lines.append(line.format_map(french(values) if page == "README.fr.md" else values))
    return "\n".join(lines) + "\n"


def french(values: dict[str, str]) -> dict[str, str]:
    swap = str.maketrans({",": NARROW_SPACE, ".": ","})
    return {name: value if name == "type" else value.translate(swap) for name, value in values.items()}
