"""The recorded graph of a network: what is in it, and how it is rewritten.

tracer               the fx graph of one forward pass
liveness             which positions of a tensor reach the output: a rule for each operation
slice_propagation    slices moved to where they save the most
few_query_attention  attention of few queries
rewrite              modules in place of blocks
activations          the streams between blocks
block_analysis       chains of replaceable blocks, and refusals
independence         whether samples see each other
discovery            verified chains
"""
