"""The soak: an elastic job under random faults for as long as you like, and what became of it.

make soak MINUTES=60
"""
