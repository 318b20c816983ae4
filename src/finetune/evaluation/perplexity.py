"""logits + ids + mask -> one token-weighted score, the same formula for transformers and for llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

LogitsOf = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over trained tokens: negative log-likelihood in nats, tokens, and those that were the most likely one.

    `text_bytes`: UTF-8 bytes of the text that these tokens stand for; 0 where nobody counted them.
    """

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0
    text_bytes: int = 0

    def __add__(self, other: Score) -> Score:
        """The score of both texts together."""
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.correct + other.correct,
            self.text_bytes + other.text_bytes,
        )

    def summary(self) -> dict[str, float]:
        """Perplexity = exp(nats / tokens) and token accuracy; bits per byte = nats / ln 2 / bytes if these are known.

        Only bits per byte may be compared between vocabularies.
        """
        figures = {
            "perplexity": math.exp(self.nats / self.tokens),
            "token_accuracy": self.correct / self.tokens,
            "tokens": self.tokens,
        }
        if self.text_bytes:
            figures |= {"bits_per_byte": self.nats / math.log(2) / self.text_bytes, "bytes": self.text_bytes}
        return figures


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


def score(logits: torch.Tensor, ids: list[int], trained: list[bool], text_bytes: int = 0) -> Score:
    """Score one row; sums in float64. `text_bytes` as `trained_text_bytes` counts them, 0 if not wanted."""
    log_probabilities, targets = predictions(logits, ids, trained)
    chosen = log_probabilities.gather(1, targets[:, None]).double()
    correct = (log_probabilities.argmax(dim=-1) == targets).sum()
    return Score(-float(chosen.sum()), len(targets), int(correct), text_bytes)


def special_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens' ids and texts."""
    return {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def trained_text_bytes(
    tokenizer: Tokenizer, special: Mapping[int, str], ids: Sequence[int], trained: Sequence[bool]
) -> int:
    """UTF-8 bytes of the text of the tokens that `score` counts, without the text of special tokens.

    Each run of trained tokens is decoded behind the token before it, for a decoder may drop a space at its start.
    """
    size_bytes, position = 0, 1
    while position < len(ids):
        if not trained[position]:
            position += 1
            continue
        end = next((at for at in range(position, len(ids)) if not trained[at]), len(ids))
        whole = tokenizer.decode(ids[position - 1 : end], skip_special_tokens=False)
        before = tokenizer.decode(ids[position - 1 : position], skip_special_tokens=False)
        size_bytes += len(whole.encode()) - len(before.encode())
        size_bytes -= sum(len(special[index].encode()) for index in ids[position:end] if index in special)
        position = end
    return size_bytes


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
    # Python's max would lose a NaN behind the first text.
    return float(torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max())


def mean_loss(model: Any, rows: Iterable[Mapping[str, Any]]) -> float:
    """Token-weighted loss in nats over the trained tokens of all rows; the model's training mode is kept."""
    training = model.training
    model.eval()
    logits_of = model_logits(model)
    total = sum((score(logits_of(row["input_ids"]), row["input_ids"], row["trained"]) for row in rows), Score())
    model.train(training)
    return total.nats / total.tokens
