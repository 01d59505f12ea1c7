"""The search for a plan.

state           networks in work and moves, as values
fit_statistics  statistics on the partially compressed network
partial_run     forward passes from a boundary on
evaluator       the divergence of a candidate
candidates      every map of every unit, fitted
search          `search`, step by step
"""
