"""Checkpoints of a whole job, in files that every framework reads."""
