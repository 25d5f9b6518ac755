"""What one process does for one database outside its callers: see `background`."""
