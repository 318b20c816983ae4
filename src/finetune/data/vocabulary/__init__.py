"""Text -> a tokenizer: trained, kept or extended, and what it costs."""
