"""What computes packed linears, one kernel per kind of machine."""
