"""The modules of the evidence, for its tests."""

import sys

from support.installation import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
