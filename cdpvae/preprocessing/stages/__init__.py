"""The stages of preprocessing; a killed run continues at the last shard it finished.

    WORK/work.json                      inputs, settings and shard size that this work is for
    WORK/prepare/000-00000.arrow .json  candidates and summary of one shard of one input
    WORK/deduplicate/decisions.arrow    which candidates stay, which belong together
    WORK/*/stage.json                   what a finished stage counted, and how long it took
    WORK/result/                        the directory that is published at the end

Every file is written whole or not at all (`cdpvae.files`), so a file that exists is finished.
"""
