"""metrics/*.json, benchmarks/*.json -> the lines of the table of numbers, as each README shows them."""

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
| rows read = kept + dropped by a rule + duplicates + near-duplicates + quarantined | \
{rows} = {kept} + {dropped} + {twice} + {near} + {held} | C |
| perplexity of held-out answers ({tokens} tokens), base → tuned | \
{base} → {tuned} (× {ratio}; 95% interval {low} to {high}) | E |
| next token right, base → tuned | {base_right}% → {tuned_right}% | E |
| merged model beside base + adapter | largest logit difference {difference} | M |
| divergence from the trained 4-bit model, merged onto the 16-bit / the dequantised base | \
{kl_original} / {kl_dequantized} nats a token | M |
| GGUF {type} | {size} MiB, perplexity × {loss} of merged, KL {kl}, same first choice {same}% | Q |
| prompts served as trained | {alike} of {chats} chats | O |
| the whole pipeline, after set-up | {wall} s on {cores} cores, largest process {peak} GiB | B |
| {prepare_mb} MB of chat to packed rows, beside TRL (equal ids and masks) | {trl}× its speed, {trl_two}× with two \
processes | P |
| {dedup_mb} MB cleaned of near-duplicates, beside datatrove's MinHash | {datatrove}× its speed, {datatrove_split}× \
where it splits words at blanks; recall {recall}, precision {precision} | D |
| a BPE of 32,000 tokens from {bpe_mb} MB, beside tokenizers (equal merges) | {bpe}× its speed | T |
| {corpus_mb} MB of chat through clean, tokenizer, tokenize and split | largest process {corpus_peak} GiB | Y |
| merging {merge_gb} GB of weights, beside a plain copy of them | \
{merge_copy}× its time, {merge_peak} GB of memory (PEFT: {peft_copy}×, {peft_peak} GB) | R |
| QLoRA runs killed in epoch 1 and 2 and started again, beside a run that was not | \
{resumed} of {kills} end in equal bytes (TRL: {trl_resumed}, weights off by {trl_drift}) | K |
| a newest checkpoint damaged in {damages} ways, a good one before it | \
{survived} end in equal bytes (TRL: {trl_crashed} crash, {trl_silent} go on with a wrong state) | K |
""",
    "README.fr.md": """\
| mesure | valeur | source |
|---|---|---|
| lignes lues = gardées + écartées par une règle + doublons + quasi-doublons + quarantaine | \
{rows} = {kept} + {dropped} + {twice} + {near} + {held} | C |
| perplexité des réponses de test ({tokens}\xa0tokens), base → affiné | \
{base} → {tuned} (× {ratio} ; intervalle à 95\xa0% de {low} à {high}) | E |
| token suivant juste, base → affiné | {base_right}\xa0% → {tuned_right}\xa0% | E |
| modèle fusionné face à base + adaptateur | écart de logits maximal {difference} | M |
| divergence du modèle 4 bits entraîné, fusion sur la base 16 bits / déquantifiée | \
{kl_original} / {kl_dequantized} nats par token | M |
| GGUF {type} | {size}\xa0Mio, perplexité × {loss} du fusionné, KL {kl}, même premier choix {same}\xa0% | Q |
| prompts servis comme à l’entraînement | {alike} conversations sur {chats} | O |
| tout le pipeline, installation exceptée | {wall}\xa0s sur {cores}\xa0cœurs, plus gros processus {peak}\xa0Gio | B |
| {prepare_mb}\xa0Mo de conversations en lignes prêtes, face à TRL (mêmes ids et masques) | {trl} fois sa vitesse, \
{trl_two} fois avec deux processus | P |
| {dedup_mb}\xa0Mo nettoyés de leurs quasi-doublons, face au MinHash de datatrove | {datatrove} fois sa vitesse, \
{datatrove_split} fois s’il coupe les mots aux blancs ; rappel {recall}, précision {precision} | D |
| un BPE de 32 000 tokens appris sur {bpe_mb}\xa0Mo, face à tokenizers (mêmes fusions) | {bpe} fois sa vitesse | T |
| {corpus_mb}\xa0Mo de conversations par clean, tokenizer, tokenize et split | plus gros processus \
{corpus_peak}\xa0Gio | Y |
| fusion de {merge_gb}\xa0Go de poids, face à leur simple copie | {merge_copy} fois son temps, {merge_peak}\xa0Go de \
mémoire (PEFT\xa0: {peft_copy} fois, {peft_peak}\xa0Go) | R |
| entraînements QLoRA tués aux époques 1 et 2 puis relancés, face à un entraînement sans arrêt | \
{resumed} sur {kills} donnent les mêmes octets (TRL\xa0: {trl_resumed}, poids écartés de {trl_drift}) | K |
| dernier point de reprise abîmé de {damages} façons, le précédent intact | \
{survived} donnent les mêmes octets (TRL\xa0: {trl_crashed} plantent, {trl_silent} continuent d’un état faux) | K |
""",
}
SOURCES = {
    **{"C": "metrics/clean", "E": "metrics/evaluate", "M": "metrics/merge", "Q": "metrics/quantize_gguf"},
    **{"O": "metrics/ollama_modelfile", "B": "benchmarks/pipeline_cost", "P": "benchmarks/prepare_rows"},
    **{"D": "benchmarks/clean_dedup", "T": "benchmarks/bpe_train", "Y": "benchmarks/data_memory"},
    **{"R": "benchmarks/merge_shards", "K": "benchmarks/train_resume"},
}


def loaded(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def figures() -> dict[str, str]:
    clean, evaluated, served = (loaded(f"metrics/{name}.json") for name in ("clean", "evaluate", "ollama_modelfile"))
    cost = loaded("benchmarks/pipeline_cost.json")
    base, tuned = evaluated["base"], evaluated["tuned"]
    return {
        **{"rows": f"{clean['rows_in']:,}", "kept": f"{clean['kept']:,}", "twice": f"{clean['duplicates']:,}"},
        "near": f"{clean['near_duplicates']:,}",
        **{"dropped": f"{sum(clean['dropped'].values()):,}", "held": f"{sum(clean['quarantined'].values()):,}"},
        **{"base": f"{base['perplexity']:.2f}", "tuned": f"{tuned['perplexity']:.2f}", "tokens": f"{base['tokens']:,}"},
        **{"base_right": f"{base['token_accuracy']:.1%}"[:-1], "tuned_right": f"{tuned['token_accuracy']:.1%}"[:-1]},
        "ratio": f"{evaluated['perplexity_ratio']:.3f}",
        **{end: f"{evaluated['perplexity_ratio_interval'][end]:.3f}" for end in ("low", "high")},
        **{f"kl_{onto}": f"{each['mean_kl']:.5f}" for onto, each in loaded("metrics/merge.json")["compare"].items()},
        "difference": f"{loaded('metrics/merge.json')['max_logit_difference']:.4f}",
        "chats": f"{served['chats']:,}",
        "alike": f"{round(served['parity'] * served['chats']):,}",
        **{"wall": f"{cost['wall_s']:.0f}", "cores": f"{cost['cores']}", "peak": f"{cost['peak_rss_gib']:.2f}"},
        **data_figures(),
        **resume_figures(),
    }


def resume_figures() -> dict[str, str]:
    ours, trl = (loaded("benchmarks/train_resume.json")["ways"][name] for name in ("ours", "trl"))
    kills = ("resume_epoch_1", "resume_epoch_2")
    ends = [each["outcome"] for each in trl["torn"].values()]
    return {
        **{"kills": f"{len(kills)}", "resumed": f"{sum(ours[kill]['equal_bytes'] for kill in kills)}"},
        "trl_resumed": f"{sum(trl[kill]['equal_bytes'] for kill in kills)}",
        "trl_drift": f"{max(trl[kill]['max_abs_difference'] for kill in kills):.4f}",
        "damages": f"{len(ours['torn'])}",
        "survived": f"{sum(each['outcome'].startswith('equal') for each in ours['torn'].values())}",
        "trl_crashed": f"{ends.count('crashed')}",
        "trl_silent": f"{sum('silently' in end for end in ends)}",
    }


def data_figures() -> dict[str, str]:
    prepared, deduped = loaded("benchmarks/prepare_rows.json"), loaded("benchmarks/clean_dedup.json")
    learned, large = loaded("benchmarks/bpe_train.json"), loaded("benchmarks/data_memory.json")
    wall_s = learned["median_wall_s"]
    merged = loaded("benchmarks/merge_shards.json")
    ways = merged["ways"]
    return {
        "prepare_mb": f"{prepared['corpus_bytes'] / 1e6:,.0f}",
        **{"trl": f"{prepared['times_trl']:.1f}", "trl_two": f"{prepared['times_trl_num_proc_2']:.1f}"},
        "dedup_mb": f"{deduped['size_mb']:,.0f}",
        "datatrove": f"{deduped['datatrove_default_words']['ratio']:.1f}",
        "datatrove_split": f"{deduped['datatrove_split_words']['ratio']:.1f}",
        **{name: f"{deduped['ours'][name]:.3f}" for name in ("recall", "precision")},
        "bpe_mb": f"{learned['bounded'][0]['learned_bytes'] / 1e6:,.0f}",
        "bpe": f"{wall_s['tokenizers'] / wall_s['finetune']:.1f}",
        "merge_gb": f"{merged['size_gb']:.1f}",
        "merge_copy": f"{merged['ours_over_copy']['median']:.2f}",
        "peft_copy": f"{ways['peft']['wall_s']['median'] / ways['copy']['wall_s']['median']:.1f}",
        **{"merge_peak": f"{ways['ours']['peak_gb']:.2f}", "peft_peak": f"{ways['peft']['peak_gb']:.2f}"},
        "corpus_mb": f"{large['size_mb']:,.0f}",
        "corpus_peak": f"{max(stage['peak_process_gib'] for stage in large['stages'].values()):.2f}",
    }


def figures_by_type() -> Iterator[dict[str, str]]:
    types = loaded("metrics/quantize_gguf.json")["types"]
    for name, entry in sorted(types.items(), key=lambda item: -item[1]["size_bytes"]):
        size, same = f"{entry['size_bytes'] / MIB:.2f}", f"{entry['top1_agreement']:.1%}"[:-1]
        kl = f"{entry['mean_kl']:.5f}"
        yield {"type": f"`{name}`", "size": size, "loss": f"{entry['perplexity_ratio']:.4f}", "same": same, "kl": kl}


def expected_table(page: str) -> str:
    once, lines = figures(), []
    for line in TABLE[page].splitlines():
        head, _, source = line.removesuffix(" |").rpartition(" ")
        if source in SOURCES:
            line = f"{head} `{SOURCES[source]}.json` |"
        for values in list(figures_by_type()) if "{type}" in line else [once]:
            lines.append(line.format_map(french(values) if page == "README.fr.md" else values))
    return "\n".join(lines) + "\n"


def french(values: dict[str, str]) -> dict[str, str]:
    swap = str.maketrans({",": NARROW_SPACE, ".": ","})
    return {name: value if name == "type" else value.translate(swap) for name, value in values.items()}
