"""Input files: what a user brings, of any format, read by rows."""
