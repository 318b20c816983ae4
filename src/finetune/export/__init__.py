"""From an adapter to what is served: merge, GGUF, chat template, Modelfile and their parity."""
