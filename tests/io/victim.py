"""Imported by the processes that the tests disturb: conversions in many small parts, chunks and shards."""

import sedd.io.shards

sedd.io.shards.CHUNK, sedd.io.shards.SHARD = 256, 256 * 8  # before other modules take them over

import sedd.io.convert  # noqa: E402
import sedd.io.job  # noqa: E402

sedd.io.job.LARGEST_BLOCK = 700
