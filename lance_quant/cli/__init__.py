"""What the command lines share: logging, exit codes, arguments."""
