"""ByteDance's own source, run unedited in a child process as a witness."""
