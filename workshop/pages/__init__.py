"""Pictures, plots and tables of the help pages and documents."""
