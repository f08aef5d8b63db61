"""Which tokens are predicted: strategies, samplers, estimators, the mask proposal network."""
