"""A shard set -> augmented batches on the device, each a pure function of (seed, epoch, step)."""
