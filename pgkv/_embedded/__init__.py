"""The parts of the embedded server: its data directory and process, and where its binaries are."""
