"""Inputs per scale of the formats. No torch in here: --help of the quantization scripts shows them."""

INT4_GROUP_SIZE = 64  # the published one; any that divides the inputs works
NVFP4_BLOCK = 16  # the format allows no other
