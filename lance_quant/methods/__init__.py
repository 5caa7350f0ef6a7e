"""How weights are quantized: fusions, AWQ, GPTQ, bit allocation, and the conversion of a checkpoint."""
