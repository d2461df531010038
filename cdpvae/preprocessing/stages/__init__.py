"""The stages of preprocessing; a killed run continues at the last shard it finished.

    WORK/plan.json                      what is being made, of what, and how it is cut into shards
    WORK/prepare/000-00000.arrow .json  candidates and counts of one shard of one input
    WORK/deduplicate/decisions.arrow    which candidates stay, which belong together
    WORK/*/stage.json                   what a finished stage counted, and how long it took
    WORK/result/                        the directory that is published at the end

A file is there whole or not at all (`durable`), so what exists is done.
"""
