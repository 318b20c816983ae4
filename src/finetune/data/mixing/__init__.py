"""Token rows -> splits, a mix of the sources, and packed rows."""
