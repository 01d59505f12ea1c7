"""Networks that were trained apart on digits: stitched, matched and merged, with pictures."""
