"""The `hvd-slowmo` command: a module per subcommand, and one error handler for all in main.py."""
