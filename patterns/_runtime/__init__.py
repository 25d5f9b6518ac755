"""What the patterns share: the background of a database, and how to wait in threads and event loops."""
