"""``inward-train paper``: the tables of the papers that Inward is made of, measured anew on one model.

A *table* is a file of ``tables/``; what it needs is cut into *cells* (a draw, a fit, a training with one seed), each
written down when it is done (``cells``), so that several processes share the work and a run goes on where it was
stopped. The part of the trainer that may import the service's package: it reads states and fits heads with
``inward.offline``.
"""
