"""Tensors as they travel, whatever the framework, and the map between two frameworks' names for them."""
