"""The inner optimizer: its state, the settings that it changes, and what was saved of both."""
