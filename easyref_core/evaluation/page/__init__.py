"""One self-contained HTML page from a run's folder: `write.write_page`.

run's folder -> record.RunRecord -> score_table, plots, contact_sheet -> page.html (jinja2)
"""
