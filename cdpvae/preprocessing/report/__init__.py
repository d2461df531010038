"""The report: totals of all shards, a page of HTML, and a table for the terminal."""
