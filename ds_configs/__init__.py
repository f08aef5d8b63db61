"""DeepSpeed configurations: ZeRO stage, precision, communication. A package so that wheels carry the JSON."""
