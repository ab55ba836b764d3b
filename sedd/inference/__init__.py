"""A trained model applied to cells, and the files that come of it."""
