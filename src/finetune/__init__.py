"""Reproducible fine-tuning: raw text in; tuned, measured, quantised and served model out."""
