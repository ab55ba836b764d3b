"""The bytes of a store: its shards, their codec, and the statistics kept beside them."""
