"""Builds, installs and examines Horovod: what `hvd-slowmo install-horovod` and `hvd-slowmo doctor` do.

Horovod's last release is of 2023, comes as source only, and does not compile against today's PyTorch and TensorFlow.
`patches` holds the few changes that it needs, `build` compiles it for the frameworks found in the running environment,
`cache` keeps the wheel, `check` starts two workers that sum a tensor, and `doctor` says what is wrong with an
installation.

Only the standard library is imported at module level here; Horovod and the frameworks are reached from subprocesses.
"""
