"""What the quickstart runs on: sample pairs, a small backbone, and the report on a run with them.

The package imports nothing by itself: `pairs` and `report` do without torch.
"""
