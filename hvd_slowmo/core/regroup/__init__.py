"""Workers that leave a job or enter it: joins, and elastic jobs."""
