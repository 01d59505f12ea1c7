"""Reports as values, tables, figures and one HTML page.

comparison       `compare`: two networks on the same samples
report           the table and the page
report_data      data behind a report
changed_samples  samples whose output changed most
plots            figures
"""
