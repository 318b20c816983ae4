"""Measurements on held-out text: perplexity, token accuracy and sample generations."""
