"""Methods of gossiping workers that come and go."""

import numpy as np

from hvd_slowmo.gossip import DPSGD, SGP

METHODS = {"sgp": SGP(), "osgp": SGP(overlap=True), "dpsgd": DPSGD()}
PAIR = np.full((1, 2, 2), 0.5)  # the graph of two workers, whatever the method
