"""The search: which unit at which site, at which level, under a budget.

state           solutions, search states and candidates
plan_cost       cost of a network under a plan
span_fits       maps on the original streams; the paper's choice
fit_statistics  regression statistics on the partially compressed network
partial_run     forward passes that start at a boundary
candidates      fits of every level of every unit
evaluator       divergence of the output on the validation samples
limits          limits of a budget
log             steps and candidates of a search
context         what all steps of one search share
selection       one step: candidates screened, evaluated, chosen
refinement      maps fitted again, swaps, kept layers re-solved
search          `search`, step by step to the budget
sites           sites of the options of one stage
output_changes  output changes of options, each run alone, and their inner products
solver          combinations of options for every cost
stages          a search in stages by output changes; `search` is greedy until this one is never worse
"""
