"""logits + ids + mask -> one token-weighted score, the same formula for transformers and for llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.log import progress

LogitsOf = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Score:
    """Sums over trained tokens: negative log-likelihood in nats, tokens, and those that were the most likely one."""

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0

    def __add__(self, other: Score) -> Score:
        """The score of both texts together."""
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.correct + other.correct)

    def summary(self) -> dict[str, float]:
        """Perplexity = exp(nats / tokens), and token accuracy."""
        return {
            "perplexity": math.exp(self.nats / self.tokens),
            "token_accuracy": self.correct / self.tokens,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Comparison:
    """Sums over trained tokens: KL divergence in nats from a reference, tokens, and equal most likely tokens."""

    divergence_nats: float = 0.0
    tokens: int = 0
    agreeing: int = 0

    def __add__(self, other: Comparison) -> Comparison:
        """The comparison over both texts together."""
        return Comparison(
            self.divergence_nats + other.divergence_nats, self.tokens + other.tokens, self.agreeing + other.agreeing
        )

    def summary(self) -> dict[str, float]:
        """Mean KL divergence per token in nats, and the share of tokens whose most likely next token is equal."""
        return {"mean_kl": self.divergence_nats / self.tokens, "top1_agreement": self.agreeing / self.tokens}


def predictions(logits: torch.Tensor, ids: list[int], trained: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [n, vocabulary] and targets [n] at the trained positions; the first token is never predicted.

    `logits` is [tokens, vocabulary] and its row t predicts token t + 1.
    """
    positions = [position for position in range(1, len(ids)) if trained[position]]
    rows = torch.tensor(positions, device=logits.device) - 1
    targets = torch.tensor([ids[position] for position in positions], device=logits.device)
    return torch.log_softmax(logits[rows].float(), dim=-1), targets


def score(logits: torch.Tensor, ids: list[int], trained: list[bool]) -> Score:
    """Score one row; sums in float64."""
    log_probabilities, targets = predictions(logits, ids, trained)
    chosen = log_probabilities.gather(1, targets[:, None]).double()
    correct = (log_probabilities.argmax(dim=-1) == targets).sum()
    return Score(-float(chosen.sum()), len(targets), int(correct))


def compare(reference: torch.Tensor, other: torch.Tensor, ids: list[int], trained: list[bool]) -> Comparison:
    """KL(reference || other) and top-1 agreement over the trained positions of one row."""
    expected, _ = predictions(reference, ids, trained)
    obtained, _ = predictions(other, ids, trained)
    divergence = (expected.double().exp() * (expected.double() - obtained.double())).sum()
    agreeing = (expected.argmax(dim=-1) == obtained.argmax(dim=-1)).sum()
    return Comparison(float(divergence), len(expected), int(agreeing))


def model_logits(model: Any) -> LogitsOf:
    """A function from token ids to the model's logits [tokens, vocabulary]; one row at a time, so without padding."""

    @torch.inference_mode()
    def logits_of(ids: list[int]) -> torch.Tensor:
        batch = torch.tensor([ids], device=model.device)
        logits: torch.Tensor = model(input_ids=batch, use_cache=False).logits[0]
        return logits

    return logits_of


def all_logits(model: Any, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The logits of each text, on the CPU in float32."""
    logits_of = model_logits(model)
    return [logits_of(ids).float().cpu() for ids in texts]


def largest_difference(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest absolute difference between two models' logits of the same texts."""
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def score_by_source(logits_of: LogitsOf, rows: Iterable[Mapping[str, Any]], label: str) -> dict[str, Score]:
    """Score every row with a trained token, summed by source; sources in alphabetical order."""
    scores: dict[str, Score] = {}
    scored = [row for row in rows if any(row["trained"][1:])]
    for row in progress(scored, len(scored), "row", label):
        one = score(logits_of(row["input_ids"]), row["input_ids"], row["trained"])
        scores[row["source"]] = scores.get(row["source"], Score()) + one
    return dict(sorted(scores.items()))


def measure_beside(
    reference: LogitsOf, others: Mapping[str, LogitsOf], rows: Sequence[Mapping[str, Any]], label: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The reference's figures over all rows, and those of each other model with its divergence from the reference.

    One pass: the reference, which is the slowest, computes each row once.
    """
    whole = Score()
    totals, against = dict.fromkeys(others, Score()), dict.fromkeys(others, Comparison())
    for row in progress(rows, len(rows), "row", label):
        ids, trained = row["input_ids"], row["trained"]
        expected = reference(ids).cpu()
        whole += score(expected, ids, trained)
        for name, logits_of in others.items():
            obtained = logits_of(ids)
            totals[name] += score(obtained, ids, trained)
            against[name] += compare(expected, obtained, ids, trained)
    return whole.summary(), {name: {**totals[name].summary(), **against[name].summary()} for name in others}


def mean_loss(model: Any, rows: Iterable[Mapping[str, Any]]) -> float:
    """Token-weighted loss in nats over the trained tokens of all rows; the model's training mode is kept."""
    training = model.training
    model.eval()
    logits_of = model_logits(model)
    total = sum((score(logits_of(row["input_ids"]), row["input_ids"], row["trained"]) for row in rows), Score())
    model.train(training)
    return total.nats / total.tokens
