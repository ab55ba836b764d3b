"""Imported by the processes that the tests disturb: conversions in many small parts, chunks and shards."""

import sedd.io.convert
import sedd.io.gathered
import sedd.io.tables  # noqa: F401
from sedd.io import finish, job, shards, write

for module in (shards, finish, write):
    for name, value in {"CHUNK": 256, "SHARD": 256 * 8, "LEAST_SHARD": 256 * 2}.items():
        if hasattr(module, name):
            setattr(module, name, value)
job.LARGEST_BLOCK = 700
