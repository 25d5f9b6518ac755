"""A work queue on PostgreSQL: jobs put in the application's transaction, done at least once."""
