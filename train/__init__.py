"""Batches -> a triplet encoder on every GPU -> frozen embeddings -> a classifier."""
