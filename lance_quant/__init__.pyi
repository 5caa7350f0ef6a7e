"""The types of what lance_quant imports when it is asked for."""

from lance_quant.inference.pipeline import InputError as InputError
from lance_quant.inference.pipeline import Pipeline as Pipeline
from lance_quant.inference.pipeline import Progress as Progress
from lance_quant.inference.pipeline import Sampling as Sampling
from lance_quant.inference.pipeline import Stopped as Stopped
from lance_quant.inference.pipeline import quantize as quantize

__version__: str
