import random

import numpy as np
import pytest

from finetune.data.cleaning.near_duplicates import Bands, band_keys, band_plan, jaccards, near_duplicates, shingles

BANDS = Bands(21, 6)


def compared(texts, min_jaccard=0.8, bands=BANDS, words=5):
    """Near-duplicates, and the ranks of records that were partly compared."""
    lines = [text.encode() + b"\n" for text in texts]
    hashes, counts = shingles(b"".join(lines), np.cumsum([len(line) for line in lines]), words)
    keys = band_keys(hashes, counts, bands)
    found, partly = near_duplicates(keys, lambda rank: lines[rank], min_jaccard, words)
    return [(near.rank, near.kept, round(near.jaccard, 3)) for near in found], partly


def found_in(*arguments, **more):
    return compared(*arguments, **more)[0]


def numbered(first, last):
    return " ".join(f"w{number}" for number in range(first, last))


@pytest.mark.parametrize(
    ("min_jaccard", "permutations", "bands"),
    [(0.8, 128, Bands(21, 6)), (0.7, 128, Bands(32, 4)), (0.8, 16, Bands(8, 2)), (0.95, 256, Bands(12, 20))],
)
def test_bands_are_as_long_as_the_recall_allows(min_jaccard, permutations, bands):
    assert band_plan(min_jaccard, permutations) == bands
    assert 1 - (1 - min_jaccard**bands.rows) ** bands.count >= 0.995


def test_the_jaccard_is_the_true_one():
    # 20 words have 16 shingles; the second text has 15 of them and one more.
    assert found_in([numbered(0, 20), f"{numbered(0, 19)} other"]) == [(1, 0, 0.882)]
    own, *others = (np.array(numbers, dtype=np.uint64) for numbers in ([1, 2, 3], [2, 3, 4, 5], [9], [1, 2, 3]))
    assert jaccards(own, others).tolist() == [0.4, 0.0, 1.0]


def test_a_record_less_similar_than_asked_for_stays():
    # 14 of 18 shingles are shared: 0.778.
    assert found_in([numbered(0, 20), f"{numbered(0, 18)} x y"]) == []
    assert found_in([numbered(0, 20), f"{numbered(0, 18)} x y"], 0.77) == [(1, 0, 0.778)]


def test_no_record_goes_because_of_a_chain():
    # Each text is near to the next one, the first is not near to the third.
    texts = [numbered(0, 40), numbered(3, 43), numbered(6, 46), numbered(9, 49)]
    assert found_in(texts) == [(1, 0, 0.846), (3, 2, 0.846)]


def test_short_texts_are_one_shingle_and_texts_without_words_are_none():
    assert found_in(["Oui, bien sûr !", "oui bien sûr", "oui bien", "", "?!", "..."], words=5) == []
    assert found_in(["oui, bien sûr !", "oui bien sûr", "oui bien", "", "?!", "..."], words=5) == [(1, 0, 1.0)]


def test_repeated_shingles_count_once():
    assert found_in(["a b c " * 20, "a b c " * 30], words=2) == [(1, 0, 1.0)]


def test_pairs_at_the_threshold_are_found_as_often_as_the_plan_says():
    sampler = random.Random(1)  # noqa: S311 (a sample of texts)
    texts = []
    for pair in range(1000):
        words = [f"p{pair}w{number}" for number in range(104)]
        texts.append(" ".join(words))
        # Two words far from each other and from the ends change 10 of 100 shingles: 90 of 110.
        for place in (sampler.randrange(10, 45), sampler.randrange(55, 90)):
            words[place] = f"changed{pair}"
        texts.append(" ".join(words))
    found = found_in(texts)
    assert {near for near in found if near[:2] != (near[1] + 1, near[0] - 1)} == set()
    assert {near[2] for near in found} == {0.818}
    assert len(found) >= 990


def of_one_template(texts, common, own):
    return [f"{numbered(0, common)} {numbered(100 * text, 100 * text + own)}" for text in range(1, texts + 1)]


@pytest.mark.parametrize(("cap", "bound"), [("MAX_CANDIDATES", 5), ("BUCKET_RECORDS", 105)])
def test_a_corpus_of_one_template_takes_a_bounded_number_of_comparisons(monkeypatch, cap, bound):
    counts = []

    def counting(own, others):
        counts.append(len(others))
        return jaccards(own, others)

    monkeypatch.setattr("finetune.data.cleaning.near_duplicates.jaccards", counting)
    monkeypatch.setattr(f"finetune.data.cleaning.near_duplicates.{cap}", 5)
    found, partly = compared(of_one_template(200, 40, 12))
    assert found == []
    assert len(partly) > 100
    assert 0 < sum(counts) <= bound * 200


def test_planted_pairs_are_found_among_records_of_one_template():
    texts = of_one_template(1000, 60, 8)
    copies = [
        f"{text.rsplit(' ', 5)[0]} {numbered(9 * 10**6 + 9 * place, 9 * 10**6 + 9 * place + 5)}"
        for place, text in enumerate(texts[:100])
    ]
    found, partly = compared(texts + copies)
    assert {(rank, kept) for rank, kept, _ in found} <= {(1000 + place, place) for place in range(100)}
    assert len(found) >= 98
    assert len(partly) < 100


def test_a_small_cache_changes_nothing(monkeypatch):
    texts = [numbered(start, start + 40) for start in (0, 3, 6, 0, 3, 50, 51)]
    whole = found_in(texts)
    monkeypatch.setattr("finetune.data.cleaning.near_duplicates.CACHED_SHINGLES", 1)
    monkeypatch.setattr("finetune.data.cleaning.near_duplicates.BLOCK_SHINGLES", 1)
    assert found_in(texts) == whole == [(1, 0, 0.846), (3, 0, 1.0), (4, 2, 0.846), (6, 5, 0.946)]
