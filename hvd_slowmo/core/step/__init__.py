"""A step: the state machine around the inner step, outer steps, late exchanges, measurements."""
