"""Build, install and examine Horovod, for `hvd-slowmo install-horovod` and `hvd-slowmo doctor`.

The last release of Horovod dates from 2023, is distributed as source only, and does not compile against current PyTorch
and TensorFlow. `patches` holds the few changes that it needs. `build` compiles it for the frameworks of the running
environment, and `cache` keeps the wheel. `check` starts two workers that sum a tensor. `doctor` diagnoses an
installation.

These modules import only the standard library at module level. Subprocesses import Horovod and the frameworks.
"""
