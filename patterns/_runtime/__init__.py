"""What the patterns share: background work, forks, threads and event loops."""
