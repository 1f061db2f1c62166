"""Side by side with a reference: the same weights and inputs through its own code and through ours.

`problem.Problem` says what is compared, `exchange` puts it into a folder, `process` lets a reference answer it in a
process of its own, `compare` holds our answers against its answers, `report` says what came of it.
"""
