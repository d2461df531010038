"""The models, a folder each: tensor in, tensor out."""
