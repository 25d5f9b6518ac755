"""What is to be done: operations and flows as values, and how values become bytes. Nothing is performed here."""
