"""DeepSpeed configurations: ZeRO stage, precision, communication. A package so that wheels include the JSON files."""
