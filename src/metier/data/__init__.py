"""Documents and rows become a data set: read `build`, change a sibling.

    ingest     files and packages -> documents; a reader turns them into demonstrations
    importers  JSON Lines in the known forms -> demonstrations
    dedupe     exact duplicates, conflicts, groups of near duplicates
    split      whole groups to train, valid and test
    check      schema of answers, leaks between splits, labels, findings
    build      * the front function: runs the stages from top to bottom and writes the folder

Nothing here needs torch. Every input row ends in the ledger: used, duplicate, or rejected with a reason.
"""
