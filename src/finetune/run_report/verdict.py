"""RunFacts -> the three sentences that come first: is it better, is it served as trained, what did small files cost."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.run_report.facts import RunFacts, number
from finetune.run_report.formats import bare_ratio, count, interval, percent, ratio
from finetune.run_report.measured import budget_faults


@dataclass(frozen=True)
class Verdict:
    """`figure`: the number itself; `text`: what it means; `kind`: good, bad, or open where nothing can be said."""

    title: str
    figure: str
    text: str
    kind: str


def verdicts(facts: RunFacts) -> list[Verdict]:
    """Tuned beside base, served prompts beside trained ones, the GGUF file that lost most."""
    return [_better(facts), _served(facts), _quantised(facts)]


def _better(facts: RunFacts) -> Verdict:
    change = number(facts.metrics, "evaluate", "perplexity_ratio")
    bounds = facts.metrics["evaluate"].get("perplexity_ratio_interval")
    title = "Perplexity of held-out answers, tuned / base"
    if bounds is None:
        return Verdict(title, ratio(change), "its 95 % interval was not measured", "open")
    within = f"95 % interval {interval(bounds, bare_ratio)}"
    if bounds["low"] <= 1 <= bounds["high"]:
        return Verdict(title, ratio(change), f"no clear change: {within}", "open")
    better = bounds["high"] < 1
    return Verdict(title, ratio(change), f"{'better' if better else 'worse'}: {within}", "good" if better else "bad")


def _served(facts: RunFacts) -> Verdict:
    parity = number(facts.metrics, "ollama_modelfile", "parity")
    chats = number(facts.metrics, "ollama_modelfile", "chats")
    equal = parity == 1.0
    text = f"{count(round(parity * chats))} of {count(chats)} test chats have the token ids of training"
    return Verdict("Prompts served as trained", percent(parity), text, "good" if equal else "bad")


def _quantised(facts: RunFacts) -> Verdict:
    losses = {name: number(facts.metrics, "quantize_gguf", "types", name, "perplexity_ratio") for name in facts.types}
    worst = max(losses, key=lambda name: (losses[name], name))
    faults = budget_faults(facts)
    text = f"{worst}; every file is within its budget" if not faults else f"{worst}; over budget: {'; '.join(faults)}"
    return Verdict("Worst quantised perplexity / merged", ratio(losses[worst]), text, "bad" if faults else "good")
