"""Recipes: configurations as YAML, and in parts/ their parts. A package, so that wheels contain them."""
