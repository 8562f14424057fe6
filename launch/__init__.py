"""The `moleprint` command and what stands on top of every stage."""
