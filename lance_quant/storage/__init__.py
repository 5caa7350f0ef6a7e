"""Files on disk: safetensors by offsets, outputs that appear whole or not at all, resumable jobs."""
