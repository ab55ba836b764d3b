"""A store to batches: which cells, in what order, in which memory, on which threads."""
