"""The evidence: the paper's questions at the scale of two processor cores, by simulated workers, as docs/evidence.md.

make evidence          # about three hours
make evidence-quick    # about ten minutes, with fewer seeds, workers and steps
"""
