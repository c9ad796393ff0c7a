"""The algorithm, once, for any framework. It imports NumPy only.

A directory imports only from those above it in this list, which is also the order in which to read:

1. `parts` — what all others work with: the events of each step, from the step count alone (`schedule`); lines 6 to 8 of
   Algorithm 1 (`outer_update`); scalars, messages, tensors and traced decisions, the seams to an adapter (`progress`,
   `layout`, `store`, `ops`).
2. `start` — the collectives at the start of a job (`startup`), and what the workers agree on there.
3. `average` — how workers meet, judge and average: outer steps (`ledger`, `meeting`), gradients, gossip between outer
   steps (`mixing`).
4. `step` — a step (`machine`), its outer step (`outer_step`), late exchanges (`flights`), measurements.
5. `regroup` — workers that are done before others (`join`), and jobs whose workers come and go (`membership`).
"""
