"""Named runs as YAML. A package so that wheels carry them."""
