"""Records -> token ids and loss masks."""
