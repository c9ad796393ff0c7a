"""The start of a job: arguments, the comparison of settings, the gossip graph, the first collectives."""
