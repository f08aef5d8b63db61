"""Choice of the tokens to predict: strategies, samplers, estimators and the mask proposal network."""
