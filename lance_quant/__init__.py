"""lance-quant: ByteDance's Lance in 4 bits, and a runtime that needs nothing of the official source.

    lance_quant.lance      the model: configuration, packing, decoder, tasks, loader
    lance_quant.convert    float checkpoint -> packed folder (INT4 or NVFP4)
    lance_quant.stats      activation statistics between calibration and quantization
    lance_quant.compare    how far a quantized run is from its baseline

The scripts at the root of the repository are thin over this package.
"""

__version__ = "0.1.0"
