"""Imported by the processes that the tests disturb: conversions in many small parts, chunks and shards."""

import sedd.io.convert  # noqa: F401
from sedd.io import finish, gathered, job, parts, shards

for module in (shards, finish, gathered, parts):
    for name, value in {"CHUNK": 256, "SHARD": 256 * 8}.items():
        if hasattr(module, name):
            setattr(module, name, value)
job.LARGEST_BLOCK = 700
