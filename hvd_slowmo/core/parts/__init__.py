"""The parts that every stage of the algorithm works with: scalars, messages, tensors, the schedule, the update."""
