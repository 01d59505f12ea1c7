"""Recording, analysis and rewriting of a network's graph.

tracer               the fx graph of one forward pass
liveness             which positions of a tensor reach the output: a rule for each operation
slice_propagation    slices propagated upstream through the graph
attention_heads      attention of a block with other sizes
few_query_attention  attention of few queries, without keys and values
channel_groups       channels between layers of a block that can be taken away
token_merging        the most similar positions of a stream joined
rewrite              modules in place of blocks
activations          streams between blocks, read during a forward pass
block_analysis       chains of replaceable blocks, and refusals
independence         check that the samples of a batch are independent
discovery            chains of replaceable blocks, verified
"""
