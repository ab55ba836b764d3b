"""Files to shards: read, check, narrow, count and publish a store."""
