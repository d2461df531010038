"""Which records are worth training on.

A filter is a pure function from a `Record` to None (keep) or a short, constant reason, so that
preprocessing can count what it drops and why. Filters are picklable, as worker processes run them.
`build.py` makes the filters that the settings ask for.
"""
