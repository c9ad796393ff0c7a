"""Both frameworks with their adapters, imported by the server of `support.forking`."""

import hvd_slowmo.torch  # first: in the other order its libraries may not load

# isort: split
import hvd_slowmo.tf  # noqa: F401
