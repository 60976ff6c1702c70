"""Trains a policy on pairs that an Inward service scored: cDPO with a confidence per pair, and reward models with
margins.

``losses`` is the method, ``trainer`` puts it on TRL, ``sources`` is where pairs come from, ``loop`` is the online loop:
pairs → optimiser steps → a new adapter in the service → scores of the current policy → pairs.
"""

__version__ = "0.1.0"
