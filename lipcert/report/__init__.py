"""Reports on run folders: tables (pandas), figures (matplotlib), one self-contained page (Jinja2).

It reads files only, so that a report can be made where no model can run: it imports nothing of the package but `errors`
and `files`, and no torch.
"""
