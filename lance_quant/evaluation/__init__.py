"""How far a quantized run is from its baseline."""
