"""Sessions kept in PostgreSQL: the browser holds a random token, the database its hash."""
