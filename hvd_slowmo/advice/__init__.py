"""The cost of a step on given machines and networks, and the settings to take. docs/advice.md has the formulas.

Reading order: link (the network), host (the processors), training (the user's step), cost (the formulas), recommend.
"""
