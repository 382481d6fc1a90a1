"""Where shard tasks run: this machine, or the ranks of a job. A launcher never changes a byte of the cache."""
