"""datatrove's MinHash deduplication of JSON lines, run by the Python that has datatrove: see clean_dedup.py.

`python peer_minhash.py INPUT_FOLDER WORK_FOLDER WORKERS WORDS`; WORDS is `default` for its word tokenizer (spaCy's,
for English) or `split` for `str.split`, which is what can be had for nothing. All else is as its example has it:
five-word shingles, 14 buckets of 8 hashes, four steps, one task for each worker.
"""

from __future__ import annotations

import sys

from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
from datatrove.pipeline.dedup import (  # type: ignore[import-not-found]
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig  # type: ignore[import-not-found]
from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
from datatrove.pipeline.writers import JsonlWriter  # type: ignore[import-not-found]


class SplitWords:
    """A word tokenizer for datatrove that splits at white space."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split()


def main() -> None:
    """Signatures, buckets, clusters, and the rows that stay, written uncompressed."""
    source, work, workers, words = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    config = MinhashConfig()
    signatures = MinhashDedupSignature(f"{work}/signatures", config)
    if words == "split":
        signatures.word_tokenizer = SplitWords()
    kept = JsonlWriter(f"{work}/kept", compression=None)
    steps = [
        (workers, [JsonlReader(source), signatures]),
        (config.num_buckets, [MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)]),
        (1, [MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config)]),
        (workers, [JsonlReader(source), MinhashDedupFilter(f"{work}/remove"), kept]),
    ]
    for number, (tasks, pipeline) in enumerate(steps):
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=f"{work}/logs/{number}"
        ).run()


if __name__ == "__main__":
    main()
