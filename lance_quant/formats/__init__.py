"""What the bytes of a file mean: tensor names, INT4, NVFP4, 8-bit rows, and the packed folder."""
