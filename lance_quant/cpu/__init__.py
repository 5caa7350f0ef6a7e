"""C and float32 products that quantizers and kernels stand on."""
