"""The search: which unit at which site, at which level, under a budget.

state           solutions, search states and candidates
plan_cost       cost of a network under a plan
span_fits       maps on the original streams; the paper's choice
fit_statistics  regression statistics on the partially compressed network
partial_run     forward passes that start at a boundary
output_layers   layers that the outputs come from, and what they lack
candidates      fits of every level of every unit
evaluator       divergence of the output on the validation samples
limits          limits of a budget
log             steps and candidates of a search
context         what all stages of one search share
effort          amounts of work of the three efforts
refinement      kept layers re-solved, BatchNorms re-estimated
sites           sites of the options of one stage
output_changes  output changes of options, each run alone, and their inner products
solver          combinations of options for every cost
schedules       levels of all blocks of a chain at once, at a given cost
trades          trades of levels between sites, at the cost of the budget
stages          one stage: options measured, combined, the best evaluated
descent         from stage to stage, down to the budget
progress        bar, log lines, checkpoint
search          `search`
by_hand         spans that a user chose, without a search
"""
