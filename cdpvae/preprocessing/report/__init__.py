"""What happened to every record: totals, the terminal table, the HTML page."""
