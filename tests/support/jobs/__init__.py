"""Jobs for Horovod workers: functions that `support.pool` calls by name."""
