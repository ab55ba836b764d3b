"""Imported by the processes that the tests disturb: conversions in many small parts, chunks and shards."""

from sedd.io.conversion import planning, publish, shard
from sedd.io.format import shards

for module in (shards, publish, shard):
    for name, value in {"CHUNK": 256, "SHARD": 256 * 8, "LEAST_SHARD": 256 * 2}.items():
        if hasattr(module, name):
            setattr(module, name, value)
planning.LARGEST_BLOCK = 700
