"""The Keras adapter of hvd-slowmo, on TensorFlow. Its public names are those of `hvd_slowmo.tf`."""
