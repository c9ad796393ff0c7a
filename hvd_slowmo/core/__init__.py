"""The algorithm, once, for any framework. It imports NumPy only.

Read in this order:

1. `schedule` — the events of each step, from the step count alone; `outer_update` — lines 6 to 8 of Algorithm 1.
2. `progress`, `layout`, `store`, `ops` — scalars, messages, tensors and traced decisions: the seams to an adapter.
3. `ledger`, `meeting` — how the workers meet, judge and average; `machine` — a step, and a worker that follows others.
4. `mixing`, `graph` — gossip between outer steps; `gradient_average` — averaged gradients; `join` — uneven data.
5. `startup`, `handshake`, `broadcast`, `names` — the collectives at the start, and the names of those within a step.
6. `runtime`, `assembly`, `metrics` — the parts put together, and what they measure.
"""
