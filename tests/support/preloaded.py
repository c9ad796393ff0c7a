"""Imported by the server from which `Pool` forks its workers: both frameworks with their adapters."""

import hvd_slowmo.torch  # first: in the other order its libraries may not load

# isort: split
import hvd_slowmo.tf  # noqa: F401
