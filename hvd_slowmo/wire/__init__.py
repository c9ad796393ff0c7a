"""How a framework's tensors become those that travel, and which is which in another framework."""
