"""Sample files, pictures and clips."""
