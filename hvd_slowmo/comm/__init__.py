"""Collectives: the protocol that the core needs, threads as workers, and Horovod."""
