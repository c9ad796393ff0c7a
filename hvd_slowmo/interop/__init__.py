"""What needs both frameworks: comparing and copying models."""
