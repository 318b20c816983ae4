"""Sources -> files below data/raw: local files, and the Hub at one commit, whole or streamed."""
