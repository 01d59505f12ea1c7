"""Measurements of the calibration data, in one pass, and of networks.

cost, latency, fidelity  MACs and parameters, paired times, divergences
criterion                the divergence that each output is compared by
quadratic_form           second-order form of a divergence
chain_statistics         moments and similarities of a chain
search_record            networks that a search evaluated, for another one
profiler                 `profile`
drift                    distance of later data from the calibration samples
"""
