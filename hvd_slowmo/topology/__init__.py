"""Gossip topologies and push-sum weights: linear algebra on small arrays. NumPy only."""
