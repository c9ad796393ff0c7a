"""Averages over the workers: meetings, gradients, gossip, messages in few bits."""
