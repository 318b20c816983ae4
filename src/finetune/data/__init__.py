"""Text to training rows: sources, formats, filters, chat rendering, splits and packing. Imports no torch."""
