"""A file of preference pairs in, the same file with margins and confidences out.

The path of a row: ``files`` reads it, ``pairs`` finds prompt and answers in it, ``asking`` has it scored by the
service's own ``/margin`` (in this process or at a URL), ``work`` keeps the result, and ``merge`` writes it beside the
row; ``summary`` and ``page`` show the whole.
"""
