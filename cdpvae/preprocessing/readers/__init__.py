"""How each kind of input is read: lines, JSON, tables, Parquet, the hub.

Each module turns one kind of input into a stream of `RawRecord`, in memory that does not grow with
the input. A damaged record becomes a problem in its place. `source.py` chooses the module.
"""
