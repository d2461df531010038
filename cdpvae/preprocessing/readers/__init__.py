"""How each kind of input is read: lines, JSON, tables, Parquet, the hub.

Each module turns one kind of input into a stream of `RawRecord`, in memory that does not grow with
the input. What is damaged is handed on as a problem in its place. `readers.py` puts them together.
"""
