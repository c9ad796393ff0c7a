"""The `hvd-slowmo` command: a file per subcommand."""
