"""Input files and the documents in them."""
