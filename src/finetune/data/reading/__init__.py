"""Raw files -> rows: containers (JSON lines, tables, Parquet, ChatML) and formats (what a row means)."""
