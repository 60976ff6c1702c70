"""A file of preference pairs in, the same file with margins and confidences out.

The path of a row: ``inward_client.rows`` reads it and finds prompt and answers in it, ``scorer`` has it scored (in this
process or at a URL), ``work`` keeps the result, and ``merge`` writes it beside the row; ``summary`` and ``page`` show
the whole. ``plan`` refuses what can be refused before that, and ``run`` does it.
"""
