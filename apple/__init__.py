"""Lance's understanding path on Apple hardware: extraction, MLX and Core ML; see README.md in this folder."""
