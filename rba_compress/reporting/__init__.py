"""Reports as values, tables, figures and one HTML page.

report           the table and the page
report_data      what stands behind a report
changed_samples  the samples that changed most
plots            figures
"""
