"""Rows -> records to keep: repair, rules, duplicates, contamination, and a count of each loss."""
