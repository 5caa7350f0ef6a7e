"""lance-nano: a Lance small enough to train on a CPU and good enough to judge a quantizer by."""
