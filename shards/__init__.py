"""A table of photographs -> one shard set: split without leaks, checked, indexed."""
